// Line and bar charts over steps, drawn as SVG without any library.

import { make, setText } from "./tables.js";

const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 190;
const EDGE = { top: 10, right: 12, bottom: 24, left: 52 };
const MOST_DOTS = 60;

function draw(tag, attributes, parent) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  parent?.append(element);
  return element;
}

/** The least of 1, 2, 5, 10, 20, ... that is not less. */
function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].find((factor) => factor * power >= value) * power;
}

/** Round values from at most `low` to at least `high`, about four of them. */
export function ticks(low, high) {
  const unit = roundUp((high - low) / 4 || 1);
  const values = [];
  for (let count = Math.floor(low / unit); values.length === 0 || values.at(-1) < high; count += 1) values.push(count * unit);
  return values;
}

/**
 * A figure: title, legend with the values of one step, and the drawing.
 *
 * A series is {name, kind, value}: `kind` names its class, `value` takes a step to a number or null. Bars are
 * stacked in the order of the series.
 */
export class Chart {
  constructor(parent, { title, series, bars = false, fromZero = true, format }) {
    Object.assign(this, { title, series, bars, fromZero, format, steps: [], hovered: null });
    this.figure = make("figure", bars ? "bars" : "lines");
    this.figure.append(make("h3", "", title));
    this.legend = make("ul", "legend");
    this.values = series.map((one) => {
      const item = make("li");
      const value = make("b");
      item.append(make("i", one.kind), make("span", "", one.name), value);
      this.legend.append(item);
      return value;
    });
    this.where = make("li", "where");
    this.legend.prepend(this.where);
    this.svg = draw("svg", { role: "img" });
    this.figure.append(this.legend, this.svg);
    parent.append(this.figure);
    this.svg.addEventListener("pointermove", (event) => this.hover(event));
    this.svg.addEventListener("pointerleave", () => this.hover(null));
    new ResizeObserver(() => this.redraw()).observe(this.figure);
  }

  show(steps) {
    this.steps = steps;
    this.redraw();
  }

  hover(event) {
    const box = this.svg.getBoundingClientRect();
    this.hovered = event && this.steps.length ? this.nearest(event.clientX - box.left) : null;
    this.redraw();
  }

  nearest(pixel) {
    const share = (pixel - EDGE.left) / Math.max(1, this.width - EDGE.left - EDGE.right);
    const index = this.bars ? Math.floor(share * this.steps.length) : Math.round(share * (this.steps.length - 1));
    return Math.max(0, Math.min(this.steps.length - 1, index));
  }

  /** The last step about which there is anything to say, unless the pointer is on another. */
  chosen() {
    if (this.hovered !== null) return Math.min(this.hovered, this.steps.length - 1);
    const told = this.steps.findLastIndex((step) => this.series[0].value(step) !== null);
    return told < 0 ? this.steps.length - 1 : told;
  }

  redraw() {
    this.width = Math.max(220, this.svg.clientWidth);
    this.svg.setAttribute("viewBox", `0 0 ${this.width} ${HEIGHT}`);
    this.svg.replaceChildren();
    const chosen = this.chosen();
    this.tell(this.steps[chosen]);
    if (!this.steps.length) return;
    const scale = this.scale();
    this.axes(scale);
    if (this.bars) this.drawBars(scale);
    else this.series.toReversed().forEach((one) => this.drawLine(one, scale));
    if (this.hovered !== null) {
      const x = this.x(chosen);
      draw("line", { class: "cursor", x1: x, x2: x, y1: EDGE.top, y2: HEIGHT - EDGE.bottom }, this.svg);
    }
  }

  tell(step) {
    setText(this.where, step ? `step ${step.step}` : "no step yet");
    this.series.forEach((one, index) => setText(this.values[index], step ? this.format(one.value(step)) : ""));
    const told = step ? this.series.map((one) => `${one.name} ${this.format(one.value(step))}`).join(", ") : "nothing yet";
    this.svg.setAttribute("aria-label", `${this.title}, ${step ? `step ${step.step}: ` : ""}${told}`);
  }

  scale() {
    const all = this.steps.flatMap((step) => this.heights(step)).filter((value) => value !== null);
    const high = all.length ? Math.max(...all) : 1;
    const low = this.fromZero || !all.length ? 0 : Math.min(...all);
    const marks = ticks(low, high > low ? high : low + Math.max(1, Math.abs(low) / 10));
    return { marks, low: marks[0], high: marks.at(-1) };
  }

  heights(step) {
    const values = this.series.map((one) => one.value(step));
    return this.bars ? [values.reduce((sum, value) => sum + (value ?? 0), 0)] : values;
  }

  x(index) {
    const room = this.width - EDGE.left - EDGE.right;
    if (this.bars) return EDGE.left + (room * (index + 0.5)) / this.steps.length;
    return this.steps.length < 2 ? EDGE.left + room / 2 : EDGE.left + (room * index) / (this.steps.length - 1);
  }

  y(value, { low, high }) {
    return HEIGHT - EDGE.bottom - ((HEIGHT - EDGE.top - EDGE.bottom) * (value - low)) / (high - low);
  }

  axes(scale) {
    for (const mark of scale.marks) {
      const y = this.y(mark, scale);
      draw("line", { class: "grid", x1: EDGE.left, x2: this.width - EDGE.right, y1: y, y2: y }, this.svg);
      draw("text", { class: "mark", x: EDGE.left - 6, y: y + 4, "text-anchor": "end" }, this.svg).textContent = this.format(mark, true);
    }
    const apart = roundUp(Math.max(1, this.steps.length / Math.max(2, Math.floor(this.width / 60))));
    this.steps.forEach((step, index) => {
      if (step.step % apart) return;
      draw("text", { class: "mark", x: this.x(index), y: HEIGHT - 7, "text-anchor": "middle" }, this.svg).textContent = step.step;
    });
  }

  drawLine(one, scale) {
    let path = "";
    let pen = "M";
    const values = this.steps.map(one.value);
    const dots = this.steps.length <= MOST_DOTS;
    values.forEach((value, index) => {
      if (value === null) {
        pen = "M";
        return;
      }
      const [x, y] = [this.x(index), this.y(value, scale)];
      path += `${pen}${x.toFixed(1)} ${y.toFixed(1)}`;
      pen = "L";
      // A line needs two points that follow each other.
      const alone = (values[index - 1] ?? null) === null && (values[index + 1] ?? null) === null;
      if (dots || alone) draw("circle", { class: `dot ${one.kind}`, cx: x, cy: y, r: 2.6 }, this.svg);
    });
    draw("path", { class: `line ${one.kind}`, d: path }, this.svg);
  }

  drawBars(scale) {
    const width = Math.max(1, Math.min(28, ((this.width - EDGE.left - EDGE.right) / this.steps.length) * 0.7));
    this.steps.forEach((step, index) => {
      let base = 0;
      for (const one of this.series) {
        const value = one.value(step) ?? 0;
        if (!value) continue;
        const top = this.y(base + value, scale);
        draw("rect", { class: `bar ${one.kind}`, x: this.x(index) - width / 2, y: top, width, height: this.y(base, scale) - top }, this.svg);
        base += value;
      }
    });
  }
}
