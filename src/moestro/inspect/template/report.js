"use strict";
// Draws the pictures in the colours of the reader's theme: the first ones at once, the rest when they come near.
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const scales = {
    diverging: {
      light: [[0, "#b35c14"], [0.25, "#e9b37d"], [0.5, "#f4f2ee"], [0.75, "#86aedd"], [1, "#1f4f91"]],
      dark: [[0, "#f0a35e"], [0.25, "#8f5a2b"], [0.5, "#23272e"], [0.75, "#34639f"], [1, "#8fbcf5"]],
    },
    sequential: {
      light: [[0, "#f6f5f2"], [0.5, "#a6c4e6"], [1, "#1f5196"]],
      dark: [[0, "#20242b"], [0.5, "#31598c"], [1, "#86b4ef"]],
    },
  };

  function themed(layout) {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    const axis = { color: colour("--soft"), gridcolor: colour("--line"), fixedrange: true };
    const copy = structuredClone(layout);
    const scale = copy.meta && scales[copy.meta.scale];
    copy.font = { family: colour("--sans"), size: 12, color: colour("--ink") };
    copy.hoverlabel = { font: { family: colour("--sans") } };
    copy.dragmode = false;
    Object.assign(copy.xaxis, axis);
    Object.assign(copy.yaxis, axis);
    if (scale) copy.coloraxis.colorscale = scale[dark.matches ? "dark" : "light"];
    return copy;
  }

  const sizes = new ResizeObserver((entries) => {
    for (const { target } of entries) {
      if (!target.clientWidth || target.clientWidth === target.drawnWidth) continue;
      target.drawnWidth = target.clientWidth;
      Plotly.Plots.resize(target);
    }
  });

  function draw(box) {
    const spec = box.spec;
    Plotly.react(box, spec.data, themed(spec.layout), { displayModeBar: false });
    box.drawn = true;
    box.drawnWidth = box.clientWidth;
    sizes.observe(box);
  }

  const boxes = [...document.querySelectorAll(".picture")];
  for (const box of boxes) {
    const source = box.querySelector("script");
    box.spec = JSON.parse(source.textContent);
    source.remove();
  }
  const watcher = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) {
      if (isIntersecting && !target.drawn) draw(target);
    }
  }, { rootMargin: "600px" });
  boxes.forEach((box, i) => (i < 24 && box.clientWidth ? draw(box) : watcher.observe(box)));
  dark.addEventListener("change", () => boxes.filter((box) => box.drawn).forEach(draw));
  addEventListener("beforeprint", () => boxes.filter((box) => !box.drawn).forEach(draw));
})();
