"use strict";

// A number where the cell has one, else its text; undefined for an empty cell.
function key(row, column) {
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
  // The best comes first, but labels begin at their beginning.
  const isLabel = rows.length > 0 && rows[0].cells[column].tagName === "TH";
  const order = isLabel ? ["ascending", "descending"] : ["descending", "ascending"];
  const next = header.getAttribute("aria-sort") === order[0] ? order[1] : order[0];
  for (const other of header.parentElement.cells) other.setAttribute("aria-sort", "none");
  header.setAttribute("aria-sort", next);
  const sign = next === "ascending" ? 1 : -1;
  rows.sort((one, two) => {
    const [a, b] = [key(one, column), key(two, column)];
    // Empty cells stay at the end either way.
    if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);
    return sign * compare(a, b);
  });
  body.append(...rows);
}

for (const button of document.querySelectorAll("thead button")) {
  button.addEventListener("click", () => sortBy(button.closest("th")));
}
