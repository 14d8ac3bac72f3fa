// Shows, for the k, task, mask and draw that are picked, which frames of each clip training takes and which of them are hidden.
"use strict";

(() => {
  const { clips, masks } = JSON.parse(document.getElementById("data").textContent);
  if (!clips.length) return;
  const picked = { k: 5, task: "IPT", mask: 0, draw: 0 };

  const make = (kind, name) => {
    const element = document.createElement(kind);
    element.className = name;
    return element;
  };

  const along = (number, count) => (count > 1 ? (100 * number) / (count - 1) : 0) + "%";

  // One frame of a clip's sheet of frames.
  const cell = (clip, frame) => {
    const element = make("div", "cell");
    element.style.backgroundPosition =
      along(frame % clip.columns, clip.columns) + " " + along(Math.floor(frame / clip.columns), clip.rows);
    return element;
  };

  const framed = (clip, frame, cluster, label) => {
    const element = make("div", "frame");
    element.style.setProperty("--colour", `var(--c${cluster})`);
    element.title = `frame ${frame + 1}, cluster ${cluster + 1}`;
    element.append(cell(clip, frame), label);
    return element;
  };

  // A clip with fewer frames than k is used with all it has.
  const shown = (clip) => {
    const k = Math.min(picked.k, clip.frames);
    const family = masks[k][picked.task];
    const draws = clip.draws[k];
    return { k, mask: family[picked.mask % family.length], draw: draws[picked.draw % draws.length] };
  };

  const hiddenIn = (mask) => [...mask].filter((mark) => mark === "0").length;

  const drawClip = (clip, card) => {
    const { k, mask, draw } = shown(clip);
    const taken = new Set(draw.frames);
    const strip = [...draw.clusters].map((mark, frame) => {
      const element = framed(clip, frame, Number(mark), "");
      element.classList.toggle("taken", taken.has(frame));
      return element;
    });
    const chosen = draw.frames.map((frame, place) => {
      const element = framed(clip, frame, Number(draw.clusters[frame]), String(frame + 1));
      element.classList.toggle("hidden", mask[place] === "0");
      return element;
    });
    card.querySelector(".strip").replaceChildren(...strip);
    const row = card.querySelector(".chosen");
    row.replaceChildren(...chosen);
    row.style.setProperty("--columns", String(k > 4 ? Math.ceil(k / 2) : k)); // of a narrow screen
    card.querySelector(".mask-name").textContent =
      (k < picked.k ? `only ${k} frames; ` : "") + `${picked.task} ${mask.replace(/1/g, "●").replace(/0/g, "○")}  N = ${hiddenIn(mask)}`;
  };

  const draw = () => {
    for (const button of document.querySelectorAll("[data-k]")) {
      button.setAttribute("aria-pressed", String(Number(button.dataset.k) === picked.k));
    }
    for (const button of document.querySelectorAll("[data-task]")) {
      button.setAttribute("aria-pressed", String(button.dataset.task === picked.task));
    }
    const family = masks[picked.k][picked.task];
    document.getElementById("mask").textContent = `mask ${picked.mask + 1}/${family.length}, N = ${hiddenIn(family[picked.mask])}`;
    document.getElementById("draws").textContent = `draw ${picked.draw + 1}`;
    for (const clip of clips) drawClip(clip, document.getElementById(clip.card));
  };

  const pick = (change) => {
    Object.assign(picked, change);
    const count = masks[picked.k][picked.task].length;
    picked.mask = (picked.mask + count) % count;
    draw();
  };

  for (const button of document.querySelectorAll("[data-k]")) {
    button.addEventListener("click", () => pick({ k: Number(button.dataset.k), mask: 0 }));
  }
  for (const button of document.querySelectorAll("[data-task]")) {
    button.addEventListener("click", () => pick({ task: button.dataset.task, mask: 0 }));
  }
  document.getElementById("mask-before").addEventListener("click", () => pick({ mask: picked.mask - 1 }));
  document.getElementById("mask-after").addEventListener("click", () => pick({ mask: picked.mask + 1 }));
  document.getElementById("draw").addEventListener("click", () => pick({ draw: (picked.draw + 1) % clips[0].draws[3].length }));
  draw();
})();
