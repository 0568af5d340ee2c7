"use strict";
(() => {
  const pictures = JSON.parse(document.getElementById("data").textContent);
  const table = document.getElementById("candidates");
  const hover = document.getElementById("hover");

  // The picture's mixture weights
  function show(picture, frame) {
    const part = (what, b, p) => document.getElementById([picture, what, b, p].join("-"));
    frame.paths.forEach((block, b) => block.forEach(([weight, chosen, fill, ink, edge], p) => {
      const shape = part("box", b, p)?.querySelector("path");
      if (!shape) return;
      shape.style.stroke = edge;
      const slice = part("slice", b, p)?.querySelector("text");
      if (slice) {
        shape.style.fill = fill;
        shape.style.strokeWidth = chosen ? 2.6 : 1.3;
        slice.style.fill = ink;
      }
      const number = part("weight", b, p)?.querySelector("text");
      if (number) {
        number.textContent = weight;
        number.style.fill = ink;
      }
      const skipped = part("skip", b, p)?.querySelector("text");
      if (skipped) skipped.textContent = "skip " + weight;
    }));
  }

  const sliders = [...document.querySelectorAll(".slider")];
  for (const slider of sliders) {
    const input = slider.querySelector("input"), output = slider.querySelector("output");
    const frames = pictures[slider.dataset.picture];
    input.addEventListener("input", () => {
      const frame = frames[Number(input.value)];
      output.textContent = frame.label;
      input.setAttribute("aria-valuetext", frame.label);
      show(slider.dataset.picture, frame);
    });
    slider.hidden = false;
  }

  if (!table) return;

  // The table that sorts
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  const key = (row, column) => {
    const value = row.cells[column].dataset.value;
    return value === undefined ? row.cells[column].textContent : Number(value);
  };
  const compare = (a, b) => {
    if (typeof a === typeof b) return typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true });
    return typeof a === "number" ? -1 : 1;
  };
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const falling = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", falling ? "descending" : "ascending");
      const rows = [...body.rows].sort((a, b) => compare(key(a, column), key(b, column)) * (falling ? -1 : 1));
      body.append(...rows);
    });
  });

  // The candidate under the pointer
  const rows = new Map([...body.rows].map((row) => [row.dataset.row, row]));
  const points = [...document.querySelectorAll(".point")];
  points.forEach((point) => point.querySelector("title").remove()); // the box below says more
  const choose = (row) => {
    for (const one of [...points, ...body.rows]) one.classList.toggle("chosen", one.dataset.row === row);
  };
  const tell = (point) => {
    choose(point.dataset.row);
    const row = rows.get(point.dataset.row);
    hover.replaceChildren(...heads.map((head, column) => {
      const line = document.createElement("div");
      for (const text of [head.textContent, row.cells[column].textContent]) {
        line.append(Object.assign(document.createElement("span"), { textContent: text }));
      }
      return line;
    }));
    hover.hidden = false;
    const dot = point.getBoundingClientRect(), box = hover.getBoundingClientRect();
    const left = dot.right + 10 + box.width < innerWidth ? dot.right + 10 : dot.left - 10 - box.width;
    hover.style.left = Math.max(8, Math.min(left, innerWidth - box.width - 8)) + "px";
    hover.style.top = Math.max(8, Math.min(dot.top - box.height / 2, innerHeight - box.height - 8)) + "px";
  };
  for (const point of points) {
    point.addEventListener("pointerenter", () => tell(point));
    point.addEventListener("focus", () => tell(point));
    point.addEventListener("click", () => tell(point));
    for (const end of ["pointerleave", "blur"]) point.addEventListener(end, () => { hover.hidden = true; });
  }
  // A candidate in the table is framed in the charts, and shown where the slider goes through candidates
  body.addEventListener("click", (event) => {
    const row = event.target.closest("tr");
    choose(row.dataset.row);
    for (const slider of sliders) {
      const input = slider.querySelector("input");
      if (slider.dataset.of !== "candidates" || Number(row.dataset.row) > Number(input.max)) continue;
      input.value = row.dataset.row;
      input.dispatchEvent(new Event("input"));
    }
  });
})();
