// Tells what is known of the module, or of the place of a chart, under the pointer or reached by arrow keys.
const dataOf = (element) => JSON.parse(document.getElementById(element.id + "-data").textContent);
const factsAt = (data, i, j) => data.facts
  .filter((fact) => fact.values[i][j] !== null)
  .map((fact) => `${fact.before} ${fact.values[i][j]}${fact.after}`.trim())
  .join("; ");

for (const grid of document.querySelectorAll("table.heat")) {
  const told = document.getElementById(grid.id + "-told");
  const data = dataOf(grid);
  const rows = [...grid.tBodies[0].rows].map((row) => [...row.cells].filter((cell) => cell.tagName === "TD"));
  const place = new Map(rows.flatMap((row, i) => row.map((cell, j) => [cell, [i, j]])));
  let current = rows[0][0];
  current.tabIndex = 0;

  const show = (cell) => {
    const [i, j] = place.get(cell);
    const [task, projection] = data.rows[i];
    const name = [task, `layer ${j}`, ...(projection ? [projection] : [])].join(", ");
    told.textContent = `${name}: ${factsAt(data, i, j)}.`;
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

for (const plot of document.querySelectorAll(".plot[role=slider]")) {
  const told = document.getElementById(plot.id + "-told");
  const data = dataOf(plot);
  const last = data.at.length - 1;
  if (last < 0) continue;
  let current = 0;

  const show = (i) => {
    current = Math.max(0, Math.min(i, last));
    plot.querySelector(".here").setAttribute("d", `M${data.at[current]} 0v1000`);
    const text = `${data.names[current]}: ${factsAt(data, 0, current)}.`;
    told.textContent = text;
    plot.setAttribute("aria-valuenow", current);
    plot.setAttribute("aria-valuetext", text);
  };
  const moves = {
    ArrowLeft: -1, ArrowRight: 1, ArrowDown: -1, ArrowUp: 1, PageDown: -10, PageUp: 10, Home: -Infinity, End: Infinity,
  };
  plot.addEventListener("keydown", (event) => {
    if (!(event.key in moves)) return;
    event.preventDefault();
    show(current + moves[event.key]);
  });
  plot.addEventListener("focus", () => show(current));
  for (const kind of ["pointermove", "pointerdown"]) {
    plot.addEventListener(kind, (event) => {
      const box = plot.getBoundingClientRect();
      const x = 1000 * (event.clientX - box.left) / box.width;
      const far = data.at.map((place) => Math.abs(place - x));
      show(far.indexOf(Math.min(...far)));
    });
  }
}
