// Draws what /dashboard/events says, once a second. Computes nothing that is not said there.

const MAX_POINTS = 600;
const RETRY_MS = 1000;

const byId = (id) => document.getElementById(id);
const color = (index) => getComputedStyle(document.documentElement).getPropertyValue(`--c${index}`).trim();
const ink = () => getComputedStyle(document.documentElement).getPropertyValue("--soft").trim();
const grid = () => getComputedStyle(document.documentElement).getPropertyValue("--line").trim();

const number = (value, digits = 0) =>
  value === null || value === undefined
    ? "–"
    : value.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });
const percent = (value) => (value === null || value === undefined ? "–" : `${number(100 * value, 1)} %`);
const ratio = (part, whole) => (whole > 0 ? part / whole : null);

// A chart over time whose series appear as their names do.
class Chart {
  constructor(id, { isStacked = false, range = undefined, show = (value) => number(value, 1) } = {}) {
    this.element = byId(id);
    this.isStacked = isStacked;
    this.range = range;
    this.show = show;
    this.times = [];
    this.series = new Map(); // name -> values
    this.plot = null;
    new ResizeObserver(() => this.resize()).observe(this.element);
  }

  add(time, values) {
    for (const name of Object.keys(values)) {
      if (!this.series.has(name)) {
        this.series.set(name, this.times.map(() => null));
        this.drop();
      }
    }
    this.times.push(time);
    for (const [name, known] of this.series) known.push(values[name] ?? null);
    if (this.times.length > MAX_POINTS) {
      this.times.shift();
      for (const known of this.series.values()) known.shift();
    }
    if (this.plot === null) this.make();
    else this.plot.setData(this.data());
    const latest = Object.entries(values).map(([name, value]) => `${name} ${this.show(value)}`);
    this.element.setAttribute("role", "img");
    this.element.setAttribute("aria-label", `${this.caption()}; now ${latest.join(", ") || "nothing"}`);
    this.element.dataset.points = String(this.times.length);
  }

  caption() {
    return this.element.closest("figure").querySelector("figcaption").textContent;
  }

  data() {
    const rows = [...this.series.values()];
    if (!this.isStacked) return [this.times, ...rows];
    const sums = this.times.map(() => 0);
    return [this.times, ...rows.map((row) => row.map((value, i) => (sums[i] += value ?? 0)))];
  }

  make() {
    const names = [...this.series.keys()];
    const axis = { stroke: ink, grid: { stroke: grid, width: 1 }, ticks: { stroke: grid } };
    const options = {
      width: Math.max(200, this.element.clientWidth),
      height: 190,
      series: [
        { value: (_, time) => (time === null ? "–" : new Date(1000 * time).toLocaleTimeString()) },
        ...names.map((name, i) => ({
          label: name,
          stroke: color(i % 7),
          width: 2,
          spanGaps: true,
          value: (_, __, ___, at) => (at === null ? "–" : this.show(this.series.get(name)[at])),
        })),
      ],
      bands: this.isStacked
        ? names.map((_, i) => ({ series: [i + 1, i], fill: `${color(i % 7)}55` })).slice(1)
        : [],
      axes: [axis, { ...axis, size: 60 }],
      scales: { y: { range: this.range ?? ((_, __, most) => [0, Math.max(1, 1.1 * (most ?? 0))]) } },
      cursor: { drag: { x: false, y: false } },
    };
    if (this.isStacked && names.length > 0) options.series[1].fill = `${color(0)}55`;
    this.plot = new uPlot(options, this.data(), this.element);
  }

  drop() {
    if (this.plot !== null) this.plot.destroy();
    this.plot = null;
  }

  resize() {
    if (this.plot !== null) this.plot.setSize({ width: Math.max(200, this.element.clientWidth), height: 190 });
  }
}

const share = { range: () => [0, 1.02], show: percent };
const charts = {};

function fill(table, rows) {
  const body = byId(table).tBodies[0];
  // Rows stay where they are, and so does the keyboard's focus.
  while (body.rows.length > rows.length) body.deleteRow(-1);
  rows.forEach((cells, index) => {
    const row = body.rows[index] ?? body.insertRow();
    cells.forEach((cell, column) => {
      const target = row.cells[column] ?? row.insertCell();
      const { text, className = "", onClick = null, data = null } = cell instanceof Object ? cell : { text: cell };
      if (onClick !== null) {
        const button = target.firstElementChild ?? target.appendChild(document.createElement("button"));
        if (button.textContent !== text) button.textContent = text;
        button.onclick = onClick;
      } else if (target.textContent !== String(text)) {
        target.textContent = text;
      }
      target.className = className;
      if (data !== null) target.dataset.value = String(data);
    });
  });
}

function showClasses(picture) {
  fill("classes", picture.classes.map((each) => [
    each.name,
    number(each.weight, 1),
    { text: number(each.requests_in_progress), data: each.requests_in_progress },
    { text: number(each.gain_captured, 1), data: each.gain_captured },
    percent(ratio(each.gain_captured, each.gain_possible)),
    percent(each.recent_gain_ratio),
    { text: number(each.sequences_met), data: each.sequences_met },
    { text: number(each.sequences_missed), data: each.sequences_missed, className: each.sequences_missed ? "bad" : "" },
    number(each.recent_ttft_ms),
  ]));
  const of = (key) => Object.fromEntries(picture.classes.map((each) => [each.name, each[key]]));
  charts.gain.add(picture.at_unix_s, of("recent_gain_ratio"));
  charts.attainment.add(picture.at_unix_s, of("recent_attainment"));
}

function showClients(picture) {
  byId("clients-section").hidden = picture.clients.length === 0;
  fill("clients", picture.clients.map((each) => [
    each.name,
    { text: number(each.gain_captured, 1), data: each.gain_captured },
    percent(ratio(each.gain_captured, each.gain_possible)),
    percent(each.recent_gain_ratio),
    number(each.completion_tokens),
  ]));
}

function showNodes(picture) {
  fill("nodes", picture.nodes.map((each) => [
    each.endpoint_id,
    { text: each.is_usable ? "ready" : each.obstacle, className: each.is_usable ? "good" : "bad" },
    { text: number(each.running), data: each.running },
    { text: number(each.waiting), data: each.waiting },
    { text: number(each.urgent), data: each.urgent },
    { text: number(each.normal), data: each.normal },
    { text: percent(each.kv_usage_fraction), data: each.kv_usage_fraction },
    { text: number(each.preemptions), data: each.preemptions },
    number(each.recent_tokens_per_s),
    number(each.recent_step_ms, 1),
    number(each.recent_predicted_step_ms, 1),
    percent(each.recent_exposed_share),
  ]));
  const sum = (key) => picture.nodes.reduce((total, each) => total + (each[key] ?? 0), 0);
  charts.boundary.add(picture.at_unix_s, { "urgent, before it": sum("urgent"), "normal, behind it": sum("normal") });
  const steps = {};
  for (const each of picture.nodes) {
    steps[`${each.endpoint_id} measured`] = each.recent_step_ms;
    steps[`${each.endpoint_id} predicted`] = each.recent_predicted_step_ms;
  }
  charts.steps.add(picture.at_unix_s, steps);
  const blocks = {};
  for (const each of picture.nodes)
    for (const [state, count] of Object.entries(each.kv_blocks)) blocks[state] = (blocks[state] ?? 0) + count;
  charts.blocks.add(picture.at_unix_s, blocks);
  charts.copies.add(picture.at_unix_s, {
    "to the host": sum("recent_offload_bytes_per_s") / 1e6,
    "back to the device": sum("recent_onboard_bytes_per_s") / 1e6,
  });
}

function showRequests(picture) {
  fill("requests", picture.requests.map((each) => [
    { text: each.completion_id, onClick: () => showStory(each.completion_id) },
    each.client ?? "–",
    each.priority_class,
    each.state,
    each.node ?? "–",
    number(each.num_nodes),
    number(each.num_prompt_tokens),
    { text: number(each.num_completion_tokens), data: each.num_completion_tokens },
    number(each.age_s, 1),
    number(each.ttft_ms),
  ]));
}

async function showStory(id) {
  const answer = await fetch(`/dashboard/requests/${encodeURIComponent(id)}`, { headers: authorization() });
  const found = await answer.json();
  byId("story-title").textContent = id;
  const events = (found.stories ?? []).flatMap(({ told_by, story }) => story.events.map((event) => ({ told_by, ...event })));
  events.sort((one, other) => one.at_unix_s - other.at_unix_s);
  const first = events.length > 0 ? events[0].at_unix_s : 0;
  fill("events", answer.ok
    ? events.map((event) => [
        number(event.at_unix_s - first, 3),
        event.told_by,
        event.name.replaceAll("_", " "),
        Object.entries(event.attributes ?? {}).map(([key, value]) => `${key.replaceAll("_", " ")} ${value}`).join(", "),
      ])
    : [["", "", "unknown", found.error.message]]);
  byId("story").showModal();
}

function show(picture) {
  showClasses(picture);
  showClients(picture);
  showNodes(picture);
  showRequests(picture);
  const usable = picture.nodes.filter((each) => each.is_usable).length;
  byId("status").textContent = `${usable} of ${picture.nodes.length} nodes ready, ${number(picture.waiting_sequences)} sequences waiting`;
  document.body.dataset.pictures = String(Number(document.body.dataset.pictures ?? 0) + 1);
  document.body.dataset.at = String(picture.at_unix_s);
}

function authorization() {
  const key = sessionStorage.getItem("dashboard-key");
  return key === null ? {} : { authorization: `Bearer ${key}` };
}

// Reads server-sent events by hand: EventSource cannot send a key.
async function follow() {
  const answer = await fetch("/dashboard/events", { headers: authorization() });
  if (answer.status === 401) return askForKey((await answer.json()).error.message);
  if (!answer.ok) throw new Error(`the router answers ${answer.status}`);
  byId("key-form").hidden = true;
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("the router has closed the stream");
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) show(JSON.parse(event.slice("data: ".length)));
  }
}

function askForKey(message) {
  const isRepeated = sessionStorage.getItem("dashboard-key") !== null;
  sessionStorage.removeItem("dashboard-key");
  byId("key-error").textContent = isRepeated ? message : "";
  byId("key-form").hidden = false;
  byId("status").textContent = "a key is needed";
  byId("key").focus();
}

async function run() {
  try {
    await follow();
  } catch (error) {
    byId("status").textContent = `${error.message}; trying again`;
    setTimeout(run, RETRY_MS);
  }
}

function redraw() {
  for (const chart of Object.values(charts)) chart.drop();
}

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("dashboard-key", byId("key").value);
  byId("key").value = "";
  run();
});
byId("theme").addEventListener("click", () => {
  const isDark = getComputedStyle(document.documentElement).getPropertyValue("--ground").trim() !== "#ffffff";
  document.documentElement.dataset.theme = isDark ? "light" : "dark";
  redraw();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);

charts.gain = new Chart("chart-gain", share);
charts.attainment = new Chart("chart-attainment", share);
charts.boundary = new Chart("chart-boundary", { isStacked: true, show: number });
charts.steps = new Chart("chart-steps");
charts.blocks = new Chart("chart-blocks", { isStacked: true, show: number });
charts.copies = new Chart("chart-copies");
run();
