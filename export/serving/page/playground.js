// The playground: sends the chosen picture to every chosen model and shows the answers.
// The server decodes and corrupts the picture; nothing is computed here.

const SETTLE = 120; // ms without a change before asking, so that a moved slider asks once
const $ = (id) => document.getElementById(id);

const cards = []; // {name, root}
let picture = null; // Blob
let timer = 0;
let asking = null; // AbortController of the round in progress

function headers() {
  const token = $("token").value;
  return token ? { authorization: `Bearer ${token}` } : {};
}

async function fetchJson(url, options = {}) {
  const response = await fetch(url, { ...options, headers: headers() });
  if (response.status === 401) $("tokenform").hidden = false;
  const content = await response.json();
  if (!response.ok) throw new Error(content.error);
  return content;
}

function complain(text) {
  $("problem").textContent = text;
  $("problem").hidden = !text;
}

async function start() {
  try {
    const about = await fetchJson("/v1/about");
    $("tokenform").hidden = true;
    complain("");
    cards.length = 0;
    $("models").replaceChildren();
    $("samples").replaceChildren();
    about.models.forEach(addModel);
    $("corruption").replaceChildren(...about.corruptions.map((name) => new Option(name.replaceAll("_", " "), name)));
    about.samples.forEach(addSample);
    const grey = about.models[0].image_shape[0] === 1;
    const first = about.samples.findIndex((name) => name.includes("digit") === grey);
    $("samples").children[first].click();
  } catch (error) {
    complain(error.message);
  }
}

function addModel(model) {
  const root = $("card").content.cloneNode(true).firstElementChild;
  const [channels, height, width] = model.image_shape;
  const size = (model.size_bytes / 2 ** 20).toFixed(2);
  root.querySelector(".name").textContent = model.name;
  root.querySelector(".facts").textContent =
    `${height}×${width} ${channels === 1 ? "grey" : "colour"} · ${model.classes.length} classes · ` +
    `${model.precision} · ${size} MiB`;
  root.querySelector(".use").addEventListener("change", soon);
  $("models").append(root);
  cards.push({ name: model.name, root });
}

function addSample(name) {
  const button = document.createElement("button");
  const image = document.createElement("img");
  image.src = `/page/${name}`;
  image.alt = name.replace(/^.*\/|\.png$/g, "");
  button.type = "button";
  button.append(image);
  button.addEventListener("click", async () => {
    const response = await fetch(image.src);
    choose(await response.blob());
    button.setAttribute("aria-pressed", "true");
  });
  $("samples").append(button);
}

function choose(blob) {
  for (const button of $("samples").children) button.setAttribute("aria-pressed", "false");
  picture = blob;
  URL.revokeObjectURL($("original").src);
  $("original").src = URL.createObjectURL(blob);
  $("original").hidden = false;
  $("hint").hidden = true;
  soon();
}

function soon() {
  clearTimeout(timer);
  timer = setTimeout(ask, SETTLE);
}

// One model after the other, so that they do not slow each other down.
async function ask() {
  asking?.abort();
  if (!picture) return;
  const round = (asking = new AbortController());
  const severity = Number($("severity").value);
  const query = new URLSearchParams({ show: "true" });
  if (severity > 0) {
    query.set("corruption", $("corruption").value);
    query.set("severity", severity);
  }
  complain("");
  for (const card of cards) {
    const used = card.root.querySelector(".use").checked;
    card.root.classList.toggle("off", !used);
    if (!used) continue;
    query.set("model", card.name);
    try {
      const start = performance.now();
      const options = { method: "POST", body: picture, signal: round.signal };
      const answer = await fetchJson(`/v1/classify?${query}`, options);
      show(card.root, answer, performance.now() - start);
    } catch (error) {
      if (error.name === "AbortError") return;
      complain(`${card.name}: ${error.message}`);
    }
  }
}

function show(root, answer, total) {
  const seen = root.querySelector(".seen");
  seen.src = answer.seen;
  seen.hidden = false;
  root.querySelector(".bars").replaceChildren(
    ...answer.top.map(({ label, probability }) => {
      const item = document.createElement("li");
      const fill = document.createElement("div");
      fill.className = "fill";
      fill.style.width = `${100 * probability}%`;
      const [name, share] = [document.createElement("span"), document.createElement("span")];
      name.textContent = label;
      share.textContent = `${(100 * probability).toFixed(1)} %`;
      item.append(fill, name, share);
      return item;
    }),
  );
  const ms = (value) => `${value.toFixed(value < 10 ? 2 : 0)} ms`;
  const { model, queue, decode } = answer.milliseconds;
  const times = { model, queue, picture: decode, "with the network": total };
  root.querySelector(".latency").replaceChildren(
    ...Object.entries(times).map(([what, value]) => {
      const part = document.createElement("span");
      part.textContent = `${what} ${ms(value)}`;
      return part;
    }),
  );
}

$("file").addEventListener("change", () => {
  if ($("file").files.length) choose($("file").files[0]);
});
$("corruption").addEventListener("change", () => {
  if ($("severity").value === "0") setSeverity(3);
  soon();
});
$("severity").addEventListener("input", () => {
  setSeverity($("severity").value);
  soon();
});
$("tokenform").addEventListener("submit", (event) => {
  event.preventDefault();
  start();
});

function setSeverity(value) {
  $("severity").value = value;
  $("level").textContent = value;
}

for (const name of ["dragover", "dragleave", "drop"]) {
  $("drop").addEventListener(name, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", name === "dragover");
    if (name === "drop" && event.dataTransfer.files.length) choose(event.dataTransfer.files[0]);
  });
}

start();
