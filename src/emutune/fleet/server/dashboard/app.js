// Asks the server for the fleet's state, a request a second, and puts it into the page.

import { Chart } from "./charts.js";
import { ago, bytes, count, counted, fillTable, make, number, Pages, percent, seconds, setText, when } from "./tables.js";

const WATCHED_MS = 1000;
const HIDDEN_MS = 15000;
const LOST_MS = 3000;
const PATIENCE_MS = 10000;
const STORED = "emutune dashboard key";
const at = (id) => document.getElementById(id);

const state = {
  key: "",
  overview: null,
  tags: new Map(),
  detail: null,
  step: null,
  follow: true,
  heardAt: null,
  clockAhead: 0,
  timer: 0,
};

class WrongKey extends Error {}
class Unable extends Error {}

// The key

/** The key from the address, which is cleared at once, or the one that this tab had before. */
function takeKey() {
  const given = new URLSearchParams(location.hash.slice(1)).get("key");
  if (given) {
    sessionStorage.setItem(STORED, given);
    history.replaceState(null, "", location.pathname);
  }
  state.key = sessionStorage.getItem(STORED) ?? "";
}

function askForKey(why) {
  sessionStorage.removeItem(STORED);
  state.key = "";
  state.tags.clear();
  setText(at("wrong"), why);
  say("locked", "The dashboard is locked.");
  at("page").hidden = true;
  at("ask").hidden = false;
  at("key").focus();
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  state.key = at("key").value.trim();
  sessionStorage.setItem(STORED, state.key);
  at("key").value = "";
  setText(at("wrong"), "");
  poll();
});
window.addEventListener("hashchange", () => {
  takeKey();
  poll();
});

// Asking

/** What a path answers; null if it is what it was. */
async function ask(path, query = "") {
  const headers = { Authorization: `Bearer ${state.key}` };
  if (state.tags.has(path)) headers["If-None-Match"] = state.tags.get(path);
  const answer = await fetch(path + query, { headers, cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS) });
  const date = Date.parse(answer.headers.get("date"));
  if (date) state.clockAhead = date - Date.now();
  if (answer.status === 401) throw new WrongKey();
  if (answer.status === 304) return null;
  if (!answer.ok) throw new Unable(String(answer.status));
  const content = await answer.json();
  state.tags.set(path, answer.headers.get("etag"));
  return content;
}

async function poll() {
  clearTimeout(state.timer);
  if (!state.key) {
    askForKey("");
    return;
  }
  let pause = document.hidden ? HIDDEN_MS : WATCHED_MS;
  const key = state.key;
  try {
    const news = await ask("/v1/dashboard", state.overview ? `?since=${state.overview.revision}` : "");
    state.heardAt = new Date();
    if (news) state.overview = withKnownSteps(news, state.overview);
    if (news || wantedStep() !== state.detail?.summary.step) await askForStep();
    showAll();
    tellState(state.overview);
  } catch (error) {
    if (error instanceof WrongKey) {
      if (key === state.key) askForKey("The server does not know this key.");
      else poll();
      return;
    }
    tellLost(error);
    pause = LOST_MS;
  }
  clearTimeout(state.timer);
  state.timer = setTimeout(poll, pause);
}

/** The news, with those steps that have stayed as they were; a server that was started anew tells all. */
function withKnownSteps(news, known) {
  if (news.server_started_at !== known?.server_started_at) return news;
  if (!news.steps.length) return { ...news, steps: known.steps };
  const steps = new Map([...known.steps, ...news.steps].map((step) => [step.step, step]));
  return { ...news, steps: [...steps.values()].filter(({ step }) => step >= news.first_step).sort((one, other) => one.step - other.step) };
}

function wantedStep() {
  const { overview } = state;
  if (overview.step === null) return undefined;
  return state.follow || state.step === null ? overview.step : Math.min(state.step, overview.step);
}

async function askForStep() {
  const step = wantedStep();
  if (step === undefined) return;
  const path = `/v1/dashboard/steps/${step}`;
  if (state.detail?.summary.step !== step) state.tags.delete(path);
  const detail = await ask(path);
  if (detail) state.detail = detail;
}

document.addEventListener("visibilitychange", () => {
  if (!document.hidden) poll();
});

// The line that says how things are

function say(kind, text) {
  const line = at("state");
  if (line.dataset.state !== kind) line.dataset.state = kind;
  setText(line, text);
}

function stepsDone({ steps_ended: ended, steps_total: total }) {
  return ended === total ? `All ${total} steps are done` : `${ended} of ${total} steps are done`;
}

function tellState(overview) {
  const done = stepsDone(overview);
  if (overview.state === "waiting") say("waiting", "Waiting for devices: no step has begun yet.");
  else if (overview.state === "running") say("running", `Running: ${done}; the last begun is step ${overview.step}.`);
  else if (overview.state === "done") say("done", `The run has ended. ${done}.`);
  else say("stopped", `The server is being stopped. ${done}; the same command goes on from there.`);
}

function tellLost(error) {
  const { overview, heardAt } = state;
  const since = heardAt ? when(heardAt.toISOString()) : "";
  if (error instanceof Unable) say("lost", "The server cannot read its ledger now. Trying again.");
  else if (!overview) say("lost", "No connection to the server. Trying again.");
  else if (overview.state === "done")
    say("done", `The run has ended. ${stepsDone(overview)}, and the server has stopped; this is the state of ${since}.`);
  else if (overview.state === "stopped")
    say("stopped", `The server was stopped at ${since}. ${stepsDone(overview)}; the same command goes on from there.`);
  else say("lost", `No connection to the server since ${since}. What stands below is from then. Trying again.`);
}

// The page

const DOING = {
  reported: "waits for a decision",
  checking: "checks its cache",
  downloading: "fetches an emulator",
  training: "trains",
  returning: "returns its adapter",
  uploading: "uploads its text",
  "server trains": "server trains for it",
  fetching: "fetches its adapter",
  judging: "is being judged",
  idle: "between tasks",
  expected: "has not joined yet",
  left: "has left",
  revoked: "revoked",
};
const LATE = "late";
const WORDS = new Set(Object.values(DOING));
const QUIET = new Set(["expected", "idle", "left", "revoked"]);

const charts = [
  new Chart(at("charts"), {
    title: "Delay of the step",
    format: (value, short) => (short ? `${value >= 10 ? Math.round(value) : +value.toFixed(2)} s` : seconds(value)),
    series: [
      { name: "measured", kind: "measured", value: (step) => step.measured_delay_s },
      { name: "predicted", kind: "predicted", value: (step) => step.predicted_delay_s },
      { name: "of what was measured", kind: "before", value: (step) => step.known_delay_s || null },
    ],
  }),
  new Chart(at("charts"), {
    title: "Mean perplexity of the whole model",
    fromZero: false,
    format: (value, short) => (short ? String(+value.toPrecision(4)) : number(value)),
    series: [
      { name: "with adapter", kind: "measured", value: (step) => step.measured_perplexity },
      { name: "predicted", kind: "predicted", value: (step) => step.predicted_perplexity },
      { name: "before", kind: "before", value: (step) => step.perplexity_before },
    ],
  }),
  new Chart(at("charts"), {
    title: "Bytes moved",
    bars: true,
    format: bytes,
    series: [
      { name: "emulators down", kind: "measured", value: (step) => step.emulator_bytes },
      { name: "texts up", kind: "predicted", value: (step) => step.data_bytes },
      { name: "adapters", kind: "before", value: (step) => step.adapter_bytes },
    ],
  }),
];
const pages = Object.fromEntries(
  ["devices", "leases", "steps", "refusals", "faults", "deletions"].map((name) => [name, new Pages(at(`${name}-pager`), showAll)]),
);

function showAll() {
  const { overview } = state;
  if (!overview) return;
  at("ask").hidden = true;
  at("page").hidden = false;
  setText(at("name"), overview.name);
  document.title = `${overview.name}: ${overview.steps_ended} of ${overview.steps_total} steps`;
  showFacts(overview);
  for (const chart of charts) if (chart.steps !== overview.steps) chart.show(overview.steps);
  const out = overview.steps_left_out;
  at("left-out").hidden = !out;
  setText(at("left-out"), out ? `The ${count(out)} steps before step ${overview.first_step} are in the ledger.` : "");
  showDevices(overview);
  showStep();
  showSteps(overview);
  showNotes(overview);
}

function showFacts(overview) {
  const those = (wanted) => count(overview.devices.filter(wanted).length);
  const { errors, models, audit } = overview;
  const facts = [
    ["Steps", `${overview.steps_ended} of ${overview.steps_total}`, "done"],
    ["Devices", those((one) => one.joined_at && !one.revoked && !one.left), `${those((one) => !QUIET.has(one.doing))} at work, ${those(isLate)} late, ${those((one) => one.revoked)} revoked, ${those((one) => one.doing === "expected")} not joined`],
    ["Policy", overview.policy || "–", `scenario ${overview.scenario}`],
    ...models.map((model) => [several(overview) ? `Model ${model.name}` : "Model", model.kind, `${model.layers} layers, base ${model.base.slice(0, 12)}`]),
    ["Error of the delay", percent(errors.delay_percent), `median over ${counted(errors.steps, "step")}`],
    ...(errors.devices ? [["Error of the energy", percent(errors.energy_percent), `median over ${counted(errors.devices, "lease")}`]] : []),
    ["Error of the perplexity", percent(errors.perplexity_percent), `median over ${counted(errors.evaluations, "adapter")}`],
    ["Adapters", count(overview.totals["adapters.accepted"]), `accepted, ${count(overview.totals["adapters.rejected"])} refused`],
    ["Refused requests", count(audit.strangers + audit.of_devices), `${count(audit.strangers)} of strangers, ${count(audit.of_devices)} of devices`],
  ];
  const list = at("facts");
  while (list.children.length < facts.length) {
    const group = make("div");
    group.append(make("dt"), make("dd"), make("dd", "note"));
    list.append(group);
  }
  facts.forEach((texts, index) => texts.forEach((text, part) => setText(list.children[index].children[part], text)));
}

const isWorking = (one) => one.work !== null && !QUIET.has(one.doing) && one.doing !== "reported";
const isLate = (one) => isWorking(one) && one.work.state === "expired";

/** What a device does, in words. */
function does(one) {
  return DOING[one.doing === "downloading" && !one.work.of_bytes ? "checking" : one.doing];
}

/** Whether a device is called so, or does that; what stands on a button is meant exactly. */
function fits(one, wanted) {
  if (one.name.toLowerCase().includes(wanted) || (isLate(one) && LATE.includes(wanted))) return true;
  return WORDS.has(wanted) ? does(one) === wanted : does(one).includes(wanted);
}

function showDevices(overview) {
  const wanted = at("find").value.trim().toLowerCase();
  const found = overview.devices.filter((one) => !wanted || fits(one, wanted));
  showStates(overview.devices, wanted);
  fillTable(at("devices"), pages.devices.of(found).map((one) => deviceCells(one, Date.now() + state.clockAhead)), wanted ? "No device is called so, or does that." : "No device has credentials yet; emutune enroll makes them.");
}

/** How many devices do what; a button finds them. */
function showStates(devices, wanted) {
  const many = [[LATE, devices.filter(isLate).length], ...Object.values(DOING).map((text) => [text, devices.filter((one) => does(one) === text).length])].filter(([, number]) => number);
  const list = at("doing");
  while (list.children.length > many.length) list.lastChild.remove();
  while (list.children.length < many.length) list.append(make("button"));
  many.forEach(([text, number], index) => {
    const button = list.children[index];
    button.type = "button";
    setText(button, `${text}: ${count(number)}`);
    button.setAttribute("aria-pressed", String(wanted === text));
    button.onclick = () => find(wanted === text ? "" : text);
  });
}

function several(overview) {
  return overview.models.length > 1;
}

/** What a model is called, where there are several; none stands for the first. */
function ofModel(base) {
  const { overview } = state;
  if (!several(overview)) return "";
  const model = overview.models.find((one) => one.base === base) ?? overview.models[0];
  return ` of ${model.name}`;
}

function find(text) {
  at("find").value = text;
  pages.devices.page = 0;
  showAll();
}

function deviceCells(one, moment) {
  const { work, cached } = one;
  const working = isWorking(one);
  const layers = cached?.layers ? `, ${cached.layers} layers` : "";
  return [
    one.name,
    { text: isLate(one) ? `${does(one)}, ${LATE}` : does(one), kind: isLate(one) || one.doing === "revoked" ? "bad" : QUIET.has(one.doing) ? "quiet" : "" },
    working ? { text: String(work.step), title: `lease ${work.lease}, since ${when(work.opened_at)}` } : "",
    working ? movedCell(one.name, work) : "",
    cached
      ? { text: (cached.retention === null ? cached.emulator : `E ${number(cached.retention, 3)}${layers}`) + ofModel(cached.base), title: `emulator ${cached.emulator} of base ${cached.base}` }
      : { text: "nothing", kind: "quiet" },
    { text: ago(one.heard_at, moment), title: one.heard_at ? when(one.heard_at) : "" },
    { text: one.joined_at ? when(one.joined_at) : "not yet", kind: one.joined_at ? "" : "quiet" },
  ];
}

function movedCell(name, work) {
  if (!work.of_bytes) return { text: "holds it already", kind: "quiet" };
  const text = `${bytes(work.moved_bytes)} of ${bytes(work.of_bytes)}`;
  return { text, part: work.moved_bytes / work.of_bytes, label: `${name}: ${text}` };
}

function showStep() {
  const { detail, overview } = state;
  at("earlier").disabled = !detail || detail.summary.step <= 0;
  at("later").disabled = !detail || detail.summary.step >= overview.step;
  at("latest").setAttribute("aria-pressed", String(state.follow));
  if (!detail) {
    setText(at("step-title"), "Step");
    setText(at("step-note"), "");
    fillTable(at("leases"), pages.leases.of([]), "Nothing was decided yet.");
    return;
  }
  const { summary } = detail;
  setText(at("step-title"), `Step ${summary.step}`);
  setText(at("step-note"), stepNote(summary));
  fillTable(at("leases"), pages.leases.of(detail.leases).map(leaseCells), "Nobody took part.");
}

function stepNote(summary) {
  const { measured_delay_s: all, known_delay_s: some } = summary;
  const measured = all !== null ? `${seconds(all)} measured` : some ? `at least ${seconds(some)}` : "not measured";
  const delay = `delay ${measured}, ${seconds(summary.predicted_delay_s)} predicted`;
  const apart = summary.error_percent === null ? "" : ` (${percent(summary.error_percent)} apart)`;
  const times = `begun ${when(summary.begun_at)}, ${summary.ended_at ? `ended ${when(summary.ended_at)}` : "under way"}`;
  return `${times}; ${delay}${apart}; ${trainedAt(summary)}; ${adapters(summary)}.`;
}

function trainedAt({ leases, at_server: server }) {
  return `${leases - server} on the device, ${server} at the server`;
}

function adapters({ accepted, refused }) {
  return `${accepted} accepted, ${refused} refused`;
}

function leaseCells(lease) {
  const pair = (measured, predicted) => [measured, { text: predicted, kind: "predicted" }];
  return [
    lease.device,
    { text: decision(lease), title: `lease ${lease.lease}, task ${lease.task}` },
    ...pair(seconds(lease.measured_delay_s), seconds(lease.predicted_delay_s)),
    ...pair(bytes(lease.measured_bytes), bytes(lease.predicted_bytes)),
    ...pair(number(lease.measured_perplexity), number(lease.predicted_perplexity)),
    outcome(lease),
  ];
}

function decision(lease) {
  if (lease.kind === "stop") return "stop";
  const where = lease.at_server ? "at the server" : `on the device, E ${number(lease.retention, 3)}`;
  return where + ofModel(lease.base);
}

function outcome(lease) {
  const late = lease.state === "late" ? "late, " : "";
  const before = number(lease.perplexity_before);
  if (lease.accepted) return { text: `${late}accepted: ${number(lease.measured_perplexity)}, was ${before}`, kind: "good" };
  if (lease.accepted === false) {
    const why = lease.measured_perplexity === null ? "its perplexity is not finite" : `${number(lease.measured_perplexity)} is worse than ${before}`;
    return { text: `${late}refused: ${why}`, kind: "bad" };
  }
  return { text: fate(lease), kind: lease.state === "open" ? "quiet" : "bad" };
}

function fate({ state: how, reason }) {
  const why = reason ? `: ${reason}` : "";
  return how === "open" || how === "done" ? STATES[how] ?? how : `${STATES[how]}${why}`;
}

function showSteps(overview) {
  const rows = pages.steps.of(overview.steps.toReversed(), 10);
  fillTable(at("steps"), rows.map(stepCells), "No step has begun yet.");
}

const STATES = { open: "under way", failed: "failed", expired: "not done in time", late: "came late" };

function stepCells(step) {
  const shown = state.detail?.summary.step === step.step;
  const others = Object.keys(STATES).filter((name) => step[name]).map((name) => `${step[name]} ${STATES[name]}`);
  return [
    { text: String(step.step), label: `Show step ${step.step}`, pressed: shown, action: () => choose(step.step), kind: shown ? "shown" : "" },
    measuredDelay(step),
    { text: seconds(step.predicted_delay_s), kind: "predicted" },
    percent(step.error_percent),
    number(step.measured_perplexity),
    { text: number(step.predicted_perplexity), kind: "predicted" },
    trainedAt(step),
    adapters(step),
    { text: others.join(", ") || "all done", kind: step.failed || step.expired ? "bad" : others.length ? "" : "quiet" },
  ];
}

/** Where a transfer was not measured, its step took at least as long as the longest of the others. */
function measuredDelay({ measured_delay_s: measured, known_delay_s: known }) {
  if (measured !== null || !known) return seconds(measured);
  return { text: `≥ ${seconds(known)}`, kind: "quiet", title: "not every transfer was measured" };
}

function choose(step) {
  state.follow = false;
  state.step = step;
  pages.leases.page = 0;
  poll();
}

at("earlier").onclick = () => choose(state.detail.summary.step - 1);
at("later").onclick = () => choose(state.detail.summary.step + 1);
at("latest").onclick = () => {
  state.follow = !state.follow;
  state.step = state.follow ? null : state.detail?.summary.step ?? null;
  poll();
};
at("find").addEventListener("input", () => find(at("find").value));

function showNotes({ audit, faults, totals }) {
  const more = (shown, all) => (shown < all ? ` The last ${shown} are shown.` : "");
  setText(at("refusals-note"), `${count(audit.strangers)} requests of strangers, ${count(audit.of_devices)} of devices, ${count(audit.damaged)} damaged uploads.${more(audit.refusals.length, audit.strangers + audit.of_devices + audit.damaged)}`);
  fillTable(at("refusals"), pages.refusals.of(audit.refusals, 8).map((row) => [when(row.at), row.device ?? "a stranger", row.event === "refused" ? row.detail : `${row.event}${row.lease === null ? "" : ` of lease ${row.lease}`}: ${row.detail}`]), "Nothing was refused.");
  const failed = Object.entries(totals).filter(([name]) => /^leases\..*\.(failed|expired|late)$/.test(name));
  const sum = failed.reduce((total, [, many]) => total + many, 0);
  setText(at("faults-note"), `${count(sum)} leases failed or were not done in time.${more(faults.length, sum)}`);
  fillTable(at("faults"), pages.faults.of(faults, 8).map((row) => [String(row.step), row.device, { text: fate(row), kind: "bad" }]), "Every lease went well.");
  setText(at("deletions-note"), `${count(audit.deleted)} uploaded texts were deleted after training.${more(audit.deletions.length, audit.deleted)}`);
  fillTable(at("deletions"), pages.deletions.of(audit.deletions, 8).map((row) => [when(row.at), row.device ?? "", row.lease ?? "", row.detail]), "Nothing was uploaded and deleted yet.");
  fillTable(at("totals"), Object.entries(totals).map(([name, value]) => [name, name.startsWith("bytes.") ? { text: bytes(value), title: `${value} bytes` } : count(value)]), "Nothing was counted yet.");
}

takeKey();
poll();
