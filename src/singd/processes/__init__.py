"""What several processes exchange: statistics, gradients, and the factors that one of them keeps for all."""
