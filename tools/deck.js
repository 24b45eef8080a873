/* Slides: arrows, page keys, space, a click on the right or left button, or a swipe. F fills the screen. */
"use strict";

const deck = document.getElementById("deck"), slides = [...deck.querySelectorAll(".slide")];
let now = -1;

/* what is still too high or too wide for its slide is set smaller */
function fit(slide) {
  const body = slide.querySelector(".body");
  const over = () => body.scrollHeight > body.clientHeight + 1 || body.scrollWidth > body.clientWidth + 1 ||
    [...body.querySelectorAll("pre, .math")].some((e) => e.scrollWidth > e.clientWidth + 1);
  for (let size = 25; over() && size > 15; size -= 0.5) body.style.fontSize = `${size}px`;
}

function show(i) {
  const next = Math.min(slides.length - 1, Math.max(0, i));
  if (next === now) return;
  slides[now]?.classList.remove("now");
  now = next;
  slides[now].classList.add("now");
  document.getElementById("count").textContent = `${now + 1} / ${slides.length}`;
  history.replaceState(null, "", `#${now + 1}`);
}

function scale() {
  const k = Math.min(innerWidth / 1280, innerHeight / 720);
  deck.style.transform = `translate(${(innerWidth - 1280 * k) / 2}px, ${(innerHeight - 720 * k) / 2}px) scale(${k})`;
}

const KEYS = { ArrowRight: 1, ArrowDown: 1, PageDown: 1, " ": 1, ArrowLeft: -1, ArrowUp: -1, PageUp: -1 };
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Home") show(0);
  else if (event.key === "End") show(slides.length - 1);
  else if (event.key === "f" || event.key === "F") document.documentElement.requestFullscreen?.();
  else if (KEYS[event.key] && !(event.key === " " && event.target.tagName === "BUTTON")) show(now + KEYS[event.key]);
  else return;
  event.preventDefault();
});
document.getElementById("next").onclick = () => show(now + 1);
document.getElementById("back").onclick = () => show(now - 1);
let from = null;
addEventListener("touchstart", (event) => { from = event.touches[0].clientX; }, { passive: true });
addEventListener("touchend", (event) => {
  const by = event.changedTouches[0].clientX - from;
  if (Math.abs(by) > 50) show(now + (by < 0 ? 1 : -1));
});
addEventListener("resize", scale);
addEventListener("hashchange", () => show(parseInt(location.hash.slice(1), 10) - 1 || 0));
scale();
show(parseInt(location.hash.slice(1), 10) - 1 || 0);
document.fonts.ready.then(() => { slides.forEach(fit); document.body.dataset.ready = "yes"; });
