// Wide code and outputs scroll sideways: let the keyboard reach them.
document.addEventListener("DOMContentLoaded", () => {
  document.querySelectorAll(".bd-article pre, .bd-article .cell_output .text_html, .lab-panel").forEach((box) => {
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
  });
});
