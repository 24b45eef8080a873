from singd.layers.rows import DenseRows, Narrowed, Rows, WithOnes  # interim
