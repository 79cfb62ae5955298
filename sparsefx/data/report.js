"use strict";
for (const box of document.querySelectorAll(".tablebox")) {
  const body = box.querySelector("tbody");
  const rows = [...body.rows];
  const headings = [...box.querySelectorAll("th")];
  const field = box.querySelector("input");

  const key = (row, column) => {
    const cell = row.cells[column];
    return "sort" in cell.dataset ? Number(cell.dataset.sort) : cell.textContent;
  };
  const compare = (one, other) =>
    typeof one === "number" && typeof other === "number"
      ? one - other
      : String(one).localeCompare(String(other), undefined, { numeric: true });

  headings.forEach((heading, column) => {
    heading.querySelector("button").addEventListener("click", () => {
      const numbers = heading.classList.contains("n");
      const now = heading.getAttribute("aria-sort");
      const rising = now ? now === "descending" : !numbers;
      headings.forEach((each) => each.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", rising ? "ascending" : "descending");
      const sorted = [...rows].sort((one, other) => compare(key(one, column), key(other, column)) * (rising ? 1 : -1));
      body.append(...sorted);
    });
  });

  if (field) {
    field.addEventListener("input", () => {
      const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const row of rows) {
        const text = row.textContent.toLowerCase();
        row.hidden = !words.every((word) => text.includes(word));
        shown += row.hidden ? 0 : 1;
      }
      box.querySelector("output").textContent = `${shown} of ${rows.length}`;
    });
  }
}
