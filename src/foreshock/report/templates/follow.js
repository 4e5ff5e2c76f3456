"use strict";
// Only in the page that is served while runs go on: asks for the version, and loads the next one where this one was.
(() => {
  const version = document.currentScript.dataset.version;
  const KEPT = "foreshock-follow";
  const PERIOD = 2000; // milliseconds between questions
  const SETTLING = 10000; // milliseconds in which charts that are drawn may still move the page
  const inputs = () => [...document.querySelectorAll("#arms input, #filter")];
  // A chart's menu is one too, once it is drawn.
  const folds = () => [...document.querySelectorAll("details")].filter((fold) => !fold.closest(".chart"));

  function keep() {
    const set = inputs().map((input) => (input.type === "checkbox" ? input.checked : input.value));
    const state = { y: scrollY, open: folds().map((fold) => fold.open), set };
    sessionStorage.setItem(KEPT, JSON.stringify(state));
  }

  function restore({ y, open, set }) {
    if (open.length === folds().length) folds().forEach((fold, i) => (fold.open = open[i]));
    if (set.length === inputs().length) {
      inputs().forEach((input, i) => {
        const name = input.type === "checkbox" ? "checked" : "value";
        if (input[name] === set[i]) return;
        input[name] = set[i];
        for (const type of ["input", "change"]) input.dispatchEvent(new Event(type, { bubbles: true }));
      });
    }
    const settle = new ResizeObserver(() => scrollTo(0, y));
    const stop = () => settle.disconnect();
    settle.observe(document.body);
    for (const type of ["wheel", "keydown", "pointerdown", "touchstart"]) addEventListener(type, stop, { once: true });
    setTimeout(stop, SETTLING);
  }

  history.scrollRestoration = "manual";
  const kept = sessionStorage.getItem(KEPT);
  sessionStorage.removeItem(KEPT);
  if (kept) restore(JSON.parse(kept));

  setInterval(async () => {
    try {
      const answer = await fetch("version", { cache: "no-store" });
      if (!answer.ok || (await answer.text()) === version) return;
      keep();
      location.reload();
    } catch {
      // Nobody follows any more, or not yet again: the page stays as it is.
    }
  }, PERIOD);
})();
