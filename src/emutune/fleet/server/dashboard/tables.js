// Tables whose cells only ever take text: whatever a device calls itself is shown, never run.

export const PAGE_ROWS = 25;

/** Text in an element, left alone where it is the same, so that a selection or a focus stays. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** A new element with a class and text. */
export function make(tag, name = "", text = "") {
  const element = document.createElement(tag);
  if (name) element.className = name;
  if (text) element.textContent = text;
  return element;
}

/**
 * Rows of a table's body, those that are there used again.
 *
 * A cell is a text, or {text, kind, title, part, action}: `kind` is a class, `part` a share to draw as a bar,
 * `action` what a button in the cell does.
 */
export function fillTable(table, rows, empty) {
  const body = table.tBodies[0];
  const columns = table.tHead.rows[0].cells;
  const wanted = rows.length ? rows : [[{ text: empty, kind: "empty", span: columns.length }]];
  while (body.rows.length > wanted.length) body.deleteRow(-1);
  while (body.rows.length < wanted.length) body.insertRow();
  wanted.forEach((cells, index) => fillRow(body.rows[index], cells, columns));
}

function fillRow(row, cells, columns) {
  while (row.cells.length > cells.length) row.deleteCell(-1);
  cells.forEach((cell, index) => {
    const wanted = typeof cell === "string" ? { text: cell } : cell;
    const tag = index === 0 && !wanted.span ? "TH" : "TD";
    let element = row.cells[index];
    if (!element || element.tagName !== tag) {
      const fresh = document.createElement(tag);
      if (tag === "TH") fresh.scope = "row";
      if (element) element.replaceWith(fresh);
      else row.append(fresh);
      element = fresh;
    }
    fillCell(element, wanted, columns[index].className);
  });
}

function fillCell(element, cell, column) {
  element.className = [column, cell.kind ?? ""].filter(Boolean).join(" ");
  element.colSpan = cell.span ?? 1;
  element.title = cell.title ?? "";
  if (cell.action) fillButton(element, cell);
  else if (cell.part !== undefined) fillBar(element, cell);
  else {
    if (element.firstElementChild) element.replaceChildren();
    setText(element, cell.text);
  }
}

function fillButton(element, cell) {
  let button = element.querySelector("button");
  if (!button) {
    button = make("button", "link");
    button.type = "button";
    element.replaceChildren(button);
  }
  setText(button, cell.text);
  button.setAttribute("aria-label", cell.label);
  button.setAttribute("aria-pressed", String(cell.pressed));
  button.onclick = cell.action;
}

function fillBar(element, cell) {
  let bar = element.querySelector("progress");
  if (!bar) {
    bar = document.createElement("progress");
    bar.max = 1;
    element.replaceChildren(bar, make("span"));
  }
  bar.value = Math.min(1, cell.part);
  bar.setAttribute("aria-label", cell.label);
  setText(element.querySelector("span"), cell.text);
}

/** Pages of a long list; shows one and remembers which. */
export class Pages {
  constructor(nav, changed) {
    this.page = 0;
    this.count = 0;
    this.back = make("button", "", "Previous");
    this.next = make("button", "", "Next");
    this.where = make("span");
    this.back.type = this.next.type = "button";
    this.back.onclick = () => this.turn(-1, changed);
    this.next.onclick = () => this.turn(1, changed);
    nav.append(this.back, this.where, this.next);
    this.nav = nav;
  }

  turn(by, changed) {
    this.page += by;
    changed();
  }

  of(rows, length = PAGE_ROWS) {
    this.count = Math.max(1, Math.ceil(rows.length / length));
    this.page = Math.max(0, Math.min(this.page, this.count - 1));
    const first = this.page * length;
    const last = Math.min(rows.length, first + length);
    this.nav.hidden = this.count === 1;
    this.back.disabled = this.page === 0;
    this.next.disabled = this.page === this.count - 1;
    setText(this.where, `${first + 1} to ${last} of ${count(rows.length)}`);
    return rows.slice(first, last);
  }
}

const NONE = "–";

/** A number with so many digits after the point; a dash for none. */
export function number(value, digits = 2) {
  return value === null || value === undefined ? NONE : value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

/** Seconds, with as many digits as say something. */
export function seconds(value) {
  if (value === null || value === undefined) return NONE;
  return `${number(value, value >= 100 ? 0 : value >= 10 ? 1 : 2)} s`;
}

/** Bytes in decimal units. */
export function bytes(value, short = false) {
  if (value === null || value === undefined) return NONE;
  if (value === 0) return "0 B";
  const units = ["B", "kB", "MB", "GB", "TB", "PB"];
  const power = Math.max(0, Math.min(units.length - 1, Math.floor(Math.log10(value) / 3)));
  const scaled = value / 1000 ** power;
  if (short) return `${+scaled.toPrecision(3)} ${units[power]}`;
  return `${number(scaled, power === 0 || scaled >= 100 ? 0 : scaled >= 10 ? 1 : 2)} ${units[power]}`;
}

/** How many; none where nothing was counted. */
export function count(value) {
  return number(value ?? 0, 0);
}

/** So many of something, in words. */
export function counted(value, one, many = `${one}s`) {
  return `${count(value)} ${value === 1 ? one : many}`;
}

export function percent(value) {
  return value === null || value === undefined ? NONE : `${number(value, value >= 100 ? 0 : 1)} %`;
}

/** How long ago a moment was, for a person. */
export function ago(text, now) {
  if (!text) return "never";
  const passed = Math.max(0, Math.round((now - Date.parse(text)) / 1000));
  if (passed < 5) return "just now";
  if (passed < 90) return `${passed} s ago`;
  if (passed < 5400) return `${Math.round(passed / 60)} min ago`;
  if (passed < 129600) return `${Math.round(passed / 3600)} h ago`;
  return `${Math.round(passed / 86400)} days ago`;
}

/** A moment as this browser's clock says it, with the day where it is not today. */
export function when(text) {
  if (!text) return NONE;
  const moment = new Date(text);
  const time = moment.toLocaleTimeString("en-GB");
  return moment.toDateString() === new Date().toDateString() ? time : `${moment.toLocaleDateString("en-CA")} ${time}`;
}
