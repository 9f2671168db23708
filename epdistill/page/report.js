"use strict";
// Sorting, and nothing else: the page is whole without it.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = Array.from(table.tHead.rows[0].cells);
  const body = table.tBodies[0];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const rows = Array.from(body.rows);
      const key = (row) => {
        const cell = row.cells[column];
        return cell.dataset.v === undefined ? cell.textContent.trim() : Number(cell.dataset.v);
      };
      rows.sort((a, b) => {
        const [x, y] = [key(a), key(b)];
        // What was not measured stays at the end, whichever way is up.
        if (x === "" || x === "-") return y === "" || y === "-" ? 0 : 1;
        if (y === "" || y === "-") return -1;
        const order = typeof x === "number" && typeof y === "number"
          ? x - y
          : String(x).localeCompare(String(y), undefined, { numeric: true });
        return up ? order : -order;
      });
      body.append(...rows);
    });
  });
}
