// Tells what is known of the module under the pointer, or reached by arrow keys.
for (const grid of document.querySelectorAll("table.heat")) {
  const told = document.getElementById(grid.id + "-told");
  const data = JSON.parse(document.getElementById(grid.id + "-data").textContent);
  const rows = [...grid.tBodies[0].rows].map((row) => [...row.cells].filter((cell) => cell.tagName === "TD"));
  const place = new Map(rows.flatMap((row, i) => row.map((cell, j) => [cell, [i, j]])));
  let current = rows[0][0];
  current.tabIndex = 0;

  const show = (cell) => {
    const [i, j] = place.get(cell);
    const [task, projection] = data.rows[i];
    const facts = data.facts
      .filter((fact) => fact.values[i][j] !== null)
      .map((fact) => `${fact.before} ${fact.values[i][j]}${fact.after}`.trim());
    const name = [task, `layer ${j}`, ...(projection ? [projection] : [])].join(", ");
    told.textContent = `${name}: ${facts.join("; ")}.`;
  };
  const go = (i, j) => {
    const row = rows[Math.max(0, Math.min(i, rows.length - 1))];
    const cell = row[Math.max(0, Math.min(j, row.length - 1))];
    current.tabIndex = -1;
    current = cell;
    cell.tabIndex = 0;
    cell.focus();
  };
  const moves = {
    ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1],
    Home: [0, -Infinity], End: [0, Infinity], PageUp: [-10, 0], PageDown: [10, 0],
  };
  grid.addEventListener("keydown", (event) => {
    const move = moves[event.key];
    if (!move || !place.has(event.target)) return;
    event.preventDefault();
    const [i, j] = place.get(event.target);
    go(i + move[0], j + move[1]);
  });
  for (const kind of ["pointerover", "focusin", "click"]) {
    grid.addEventListener(kind, (event) => place.has(event.target) && show(event.target));
  }
}
