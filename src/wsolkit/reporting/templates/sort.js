// A click on a heading of a table of classes sorts the table by that column.
for (const button of document.querySelectorAll("table.classes th button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th"), body = button.closest("table").tBodies[0];
    const order = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    const text = row => row.cells[head.cellIndex].textContent;
    const compare = head.cellIndex === 0
      ? (a, b) => order * text(a).localeCompare(text(b), "en", {numeric: true})
      : (a, b) => {
          const x = parseFloat(text(a)), y = parseFloat(text(b));
          return isNaN(x) - isNaN(y) || order * (x - y) || 0;  // without a number: last
        };
    const rows = [...body.rows].sort(compare);
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", order > 0 ? "ascending" : "descending");
    body.append(...rows);
  });
}
