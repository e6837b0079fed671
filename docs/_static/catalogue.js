// Filters of the catalogue's table. What they are set to is read from the address: catalogue.html?claims=causal&cost=n
document.addEventListener("DOMContentLoaded", () => {
  const table = document.querySelector("table");
  const heads = [...table.tHead.rows[0].cells].map((cell) => cell.textContent.trim());
  const rows = [...table.tBodies[0].rows].map((row) => ({
    row,
    text: row.textContent.toLowerCase(),
    of: Object.fromEntries(heads.map((head, i) => [head, row.cells[i].textContent.trim()])),
  }));
  const words = { claims: (value) => value.split(", "), role: (value) => [value.replace(" (baseline)", "")] };
  const parts = (head, value) => (words[head] || ((v) => [v]))(value).filter(Boolean);
  const bar = document.createElement("form");
  bar.className = "filters";
  const add = (name, control) => {
    const label = document.createElement("label");
    control.name = name;
    label.append(name, control);
    bar.append(label);
    return control;
  };
  const search = add("search", Object.assign(document.createElement("input"), { type: "search" }));
  const choices = ["role", "status", "cost", "claims"].map((head) => {
    const values = [...new Set(rows.flatMap(({ of }) => parts(head, of[head])))].sort();
    const select = add(head, document.createElement("select"));
    select.append(new Option("all", ""), ...values.map((value) => new Option(value)));
    return [head, select];
  });
  const count = document.createElement("output");
  bar.append(count);
  const show = () => {
    const wanted = search.value.toLowerCase();
    let shown = 0;
    for (const { row, text, of } of rows) {
      row.hidden =
        !text.includes(wanted) ||
        choices.some(([head, { value }]) => value && !parts(head, of[head]).includes(value));
      shown += !row.hidden;
    }
    count.textContent = `${shown} of ${rows.length}`;
  };
  for (const [name, value] of new URLSearchParams(location.search)) {
    if (bar.elements[name]) bar.elements[name].value = value;
  }
  bar.addEventListener("input", show);
  bar.addEventListener("submit", (event) => event.preventDefault());
  (table.closest(".table-wrapper") || table).before(bar);
  show();
});
