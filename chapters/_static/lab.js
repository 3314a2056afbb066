// Wide code, outputs and pictures scroll sideways: let the keyboard reach them, and fade what is cut off.
document.addEventListener("DOMContentLoaded", () => {
  document.querySelectorAll(".bd-article .cell_output pre").forEach((pre) => {
    pre.classList.toggle("lab-prose", !/\S {2,}\S/.test(pre.textContent)); // no columns to keep: lines may break
  });
  const wide = ".bd-article pre, .cell_output, .cell_output .text_html, .bd-article div.math, .lab-panel, " +
    ".pst-scrollable-table-container, .cell_output figure > a.image-reference";
  const look = (box) => {
    const hidden = box.scrollWidth - box.clientWidth;
    if (hidden > 1) box.tabIndex = 0;
    box.classList.toggle("lab-scrolls", hidden > 1);
    box.classList.toggle("lab-more", hidden - box.scrollLeft > 4 && !box.querySelector("figcaption"));
  };
  document.querySelectorAll(wide).forEach((box) => {
    box.addEventListener("scroll", () => look(box), { passive: true });
    new ResizeObserver(() => look(box)).observe(box);
    look(box);
  });
});
