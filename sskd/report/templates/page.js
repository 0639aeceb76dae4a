"use strict";

// Return the number of a cell if it has one, else its text; undefined for an empty cell.
function sortKey(row, column) {
  const cell = row.cells[column];
  if (cell.dataset.value !== undefined) return Number(cell.dataset.value);
  return cell.textContent.trim() || undefined;
}

function compare(a, b) {
  if (typeof a === "number" && typeof b === "number") return a - b;
  return String(a).localeCompare(String(b));
}

function sortBy(header) {
  const column = header.cellIndex;
  const body = header.closest("table").tBodies[0];
  const rows = [...body.rows];
  // Numbers begin with the largest, labels with the first.
  const isLabel = rows.length > 0 && rows[0].cells[column].tagName === "TH";
  const order = isLabel ? ["ascending", "descending"] : ["descending", "ascending"];
  const next = header.getAttribute("aria-sort") === order[0] ? order[1] : order[0];
  for (const other of header.parentElement.cells) other.setAttribute("aria-sort", "none");
  header.setAttribute("aria-sort", next);
  const direction = next === "ascending" ? 1 : -1;
  rows.sort((one, two) => {
    const [a, b] = [sortKey(one, column), sortKey(two, column)];
    // Empty cells are last in both directions.
    if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);
    return direction * compare(a, b);
  });
  body.append(...rows);
}

for (const button of document.querySelectorAll("thead button")) {
  button.addEventListener("click", () => sortBy(button.closest("th")));
}
