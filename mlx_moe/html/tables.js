// Sort a table with class "sortable" by clicking a heading: numbers by size (∞ last), other cells by text.
"use strict";

function sortKey(row, column) {
  const text = row.cells[column].dataset.key ?? row.cells[column].textContent.trim();
  const number = text === "∞" ? Infinity : text === "" || text === "–" ? -Infinity : Number(text);
  return Number.isNaN(number) ? text : number;
}

function sortRows(table, column, descending) {
  const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? (a > b) - (a < b) : String(a).localeCompare(String(b)));
  const keyed = [...table.tBodies[0].rows].map((row) => [sortKey(row, column), row]);
  keyed.sort(([a], [b]) => (descending ? compare(b, a) : compare(a, b)));
  table.tBodies[0].append(...keyed.map(([, row]) => row));
}

for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    const button = document.createElement("button");
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const descending = heading.getAttribute("aria-sort") !== "descending";
      for (const other of headings) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
      sortRows(table, column, descending);
    });
  });
}
