// Shows all tasks or one beside the real clips, playing or stopped at a frame.
"use strict";

(() => {
  const slider = document.getElementById("frame");
  if (!slider) return; // no clips are shown
  const still = document.getElementById("still");
  const number = document.getElementById("number");
  const clips = document.getElementById("clips");

  const stop = (stopped) => {
    clips.classList.toggle("still", stopped);
    still.setAttribute("aria-pressed", String(stopped));
    still.textContent = stopped ? "play" : "pause";
    number.textContent = stopped ? `${slider.value} of 0–${slider.max}` : "";
    clips.style.setProperty("--at", (100 * slider.value) / slider.max + "%");
  };

  const show = (task) => {
    for (const element of document.querySelectorAll("[data-of]")) {
      element.hidden = task !== "" && element.dataset.of !== "real" && element.dataset.of !== task;
    }
    for (const button of document.querySelectorAll("[data-task]")) {
      button.setAttribute("aria-pressed", String(button.dataset.task === task));
    }
  };

  for (const button of document.querySelectorAll("[data-task]")) {
    button.addEventListener("click", () => show(button.dataset.task));
  }
  still.addEventListener("click", () => stop(!clips.classList.contains("still")));
  slider.addEventListener("input", () => stop(true));
  stop(matchMedia("(prefers-reduced-motion: reduce)").matches);
})();
