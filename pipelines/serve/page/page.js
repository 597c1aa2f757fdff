"use strict";
// One photo at a time: chosen, dropped or pasted; sent; compared. No library, nothing from elsewhere.

const $ = (id) => document.getElementById(id);
const EXTENSIONS = { "image/png": "png", "image/jpeg": "jpg", "image/webp": "webp", "image/tiff": "tif", "image/bmp": "bmp" };
const ASK_EVERY_MS = 1000;
const COLOUR_SHIFT = "Colour shift, red / green / blue";

let limits = null;
let request = null;
let photo = null;
let urls = [];
let waiting = 0;

// The token stays in this tab.
$("token").value = sessionStorage.getItem("token") || "";
const authorization = () => ($("token").value ? { Authorization: `Bearer ${$("token").value.trim()}` } : {});

async function learn() {
  try {
    const answer = await fetch("v1/model", { headers: authorization() });
    if (answer.status === 401) {
      $("token-row").hidden = false;
      $("model").textContent = "Waiting for the token";
      return;
    }
    const told = await answer.json();
    if (!answer.ok) return;
    if (!$("token-row").hidden) sessionStorage.setItem("token", $("token").value);
    limits = told.limits;
    $("model").textContent = `Model: ${told.model.label}`;
    $("limits").textContent =
      `JPEG, PNG, WebP, TIFF or BMP, up to ${limits.max_mib} MiB and ${limits.max_megapixels} megapixels`;
  } catch {
    $("model").textContent = "The service does not answer";
  }
}

function say(text, share) {
  $("state").hidden = false;
  if ($("status").textContent !== text) $("status").textContent = text;
  if (share === undefined) $("progress").removeAttribute("value");
  else $("progress").value = share;
}

function fail(told) {
  stop();
  $("problem").textContent = capital(told.problem);
  const facts = [told.expected && `expected ${told.expected}`, told.got && `got ${told.got}`];
  $("facts").textContent = capital(facts.filter(Boolean).join(", "));
  $("fix").textContent = told.fix || "";
  $("error").hidden = false;
}

const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);

function stop() {
  $("seconds").textContent = "";
  clearInterval(waiting);
  request = null;
  $("state").hidden = true;
}

function restore(file) {
  if (request) request.abort();
  photo = file;
  $("error").hidden = true;
  $("result").hidden = true;
  document.body.classList.remove("has-result");
  if (limits && file.size > limits.max_mib * 2 ** 20) {
    const got = `${(file.size / 2 ** 20).toFixed(1)} MiB`;
    fail({ problem: "the photo is too large", expected: `at most ${limits.max_mib} MiB`, got, fix: "Shrink it, or save it as JPEG." });
    return;
  }
  const query = new URLSearchParams();
  // Browsers show no TIFF.
  const format = $("format").value || (file.type === "image/tiff" ? "png" : "");
  if (format) query.set("format", format);
  if ($("scale").value) query.set("scale", $("scale").value);
  if ($("keep-colour").checked) query.set("keep_colour", "true");

  const sent = (request = new XMLHttpRequest());
  sent.open("POST", `v1/restore?${query}`);
  sent.responseType = "blob";
  sent.setRequestHeader("Content-Type", file.type.startsWith("image/") ? file.type : "application/octet-stream");
  for (const [name, value] of Object.entries(authorization())) sent.setRequestHeader(name, value);
  sent.upload.onprogress = (event) => {
    if (event.lengthComputable) say(`Uploading ${file.name || "the photo"}`, event.loaded / event.total);
  };
  sent.upload.onload = () => wait(sent);
  sent.onload = () => (sent.status === 200 ? show(sent) : refuse(sent));
  sent.onerror = () => sent === request &&
    fail({ problem: "the service does not answer", fix: "Is it running, and are you connected to it? Then try again." });
  say(`Uploading ${file.name || "the photo"}`, 0);
  sent.send(file);
}

function wait(sent) {
  const start = Date.now();
  say("Restoring");
  clearInterval(waiting);
  waiting = setInterval(async () => {
    const seconds = Math.round((Date.now() - start) / 1000);
    let ahead = 0;
    try {
      ahead = (await (await fetch("readyz")).json()).open - 1;
    } catch { /* the request itself tells */ }
    if (sent !== request) return;
    const line = ahead > 0 ? `In the queue with ${ahead} more` : "Restoring";
    $("seconds").textContent = `${seconds} s`; // not read out each time
    $("progress").setAttribute("aria-valuetext", `${line}, ${seconds} s`);
    say(line);
  }, ASK_EVERY_MS);
}

async function refuse(sent) {
  let told = { problem: `the service answered ${sent.status}` };
  try {
    told = JSON.parse(await sent.response.text());
  } catch { /* not from the service itself */ }
  if (sent !== request) return;
  if (sent.status === 401) {
    $("token-row").hidden = false;
    $("token").focus();
  }
  fail(told);
}

function show(sent) {
  stop();
  const header = (name) => sent.getResponseHeader(name) || "";
  urls.forEach((url) => URL.revokeObjectURL(url));
  urls = [URL.createObjectURL(photo), URL.createObjectURL(sent.response)];
  const [before, after] = [$("before"), $("after")];
  // Asked when it is said: whether a browser can show the upload, it tells late.
  const told = () => `Restored in ${facts["In the network"]}.` +
    (before.hidden ? "" : " Drag across the photo, or move the slider below it, to see before and after.");
  $("unseen").hidden = true;
  $("overlay").hidden = before.hidden = false;
  document.querySelector(".compare").hidden = false;
  before.onerror = () => {
    before.hidden = $("overlay").hidden = document.querySelector(".compare").hidden = true;
    $("unseen").hidden = false;
    move(0);
    announce(told);
  };
  after.onload = before.onload = arrange;
  before.src = urls[0];
  after.src = urls[1];

  const stem = (photo.name || "photo").replace(/\.[^.]*$/, "");
  const kind = sent.response.type.split(";")[0];
  $("download").href = urls[1];
  $("download").download = `${stem}-restored.${EXTENSIONS[kind] || "png"}`;

  const mended = Number(header("X-NAFNet-Tiles-Redone")) + Number(header("X-NAFNet-Tiles-Kept"));
  const shift = header("X-NAFNet-Colour-Shift").split(",").map((value) => signed(Number(value))).join(" / ");
  const facts = {
    Model: header("X-NAFNet-Model"),
    Version: header("X-NAFNet-Version") || `file ${header("X-NAFNet-Digest").slice(0, 8)}`,
    "In the network": `${Number(header("X-NAFNet-Network-Seconds")).toFixed(2)} s`,
    "In the queue": `${Number(header("X-NAFNet-Queue-Seconds")).toFixed(2)} s`,
    Size: `${(sent.response.size / 2 ** 20).toFixed(2)} MiB`,
    [COLOUR_SHIFT]: `${shift} levels of 255`,
  };
  if (mended) facts["Tiles the network broke"] = `${mended} of ${header("X-NAFNet-Tiles")}, mended`;
  $("facts-list").replaceChildren(...Object.entries(facts).map(([name, value]) => {
    const pair = document.createElement("div");
    const [term, told] = [document.createElement("dt"), document.createElement("dd")];
    term.textContent = name;
    told.textContent = value;
    if (name === COLOUR_SHIFT) pair.className = "wide";
    pair.append(term, told);
    return pair;
  }));
  $("result").hidden = false;
  document.body.classList.add("has-result");
  move(50);
  zoom(false);
  $("status").textContent = "";
  $("state").hidden = true;
  const notes = header("X-NAFNet-Notes");
  $("notes").textContent = notes && `${kind.replace("image/", "").toUpperCase()} could not hold all of the photo: ${notes}.`;
  $("notes").hidden = !notes;
  announce(told);
}

// Of what is 0 when rounded, the sign means nothing.
const signed = (value) => (Math.abs(value) < 0.05 ? "0.0" : `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(1)}`);

function announce(text) {
  // A status that appears with its text already in it is not read out by all readers.
  $("state").hidden = false;
  $("progress").hidden = $("cancel").hidden = true;
  setTimeout(() => ($("status").textContent = text()), 50);
}

// Comparison: `after` is cut off left of the divider, which stands still while a large photo is moved.
function move(percent) {
  $("slider").value = percent;
  $("slider").setAttribute("aria-valuetext", `${Math.round(percent)} % before, ${100 - Math.round(percent)} % after`);
  arrange();
}

function arrange() {
  const view = $("view");
  const share = $("slider").value / 100;
  const width = view.clientWidth;
  $("overlay").style.width = `${width}px`;
  $("overlay").style.height = `${view.clientHeight}px`;
  $("divider").style.left = `${share * width}px`;
  const cut = $("before").hidden ? 0 : view.scrollLeft + share * width;
  $("after").style.clipPath = `inset(0 0 0 ${cut}px)`;
}

function zoom(full) {
  $("view").className = full ? "full" : "fit";
  $("fit").setAttribute("aria-pressed", String(!full));
  $("full").setAttribute("aria-pressed", String(full));
  for (const image of [$("before"), $("after")]) {
    // One pixel of the photo is one of the screen.
    image.style.width = full ? `${$("after").naturalWidth / devicePixelRatio}px` : "";
  }
  if (full) {
    $("view").scrollLeft = ($("view").scrollWidth - $("view").clientWidth) / 2;
    $("view").scrollTop = ($("view").scrollHeight - $("view").clientHeight) / 2;
  }
  arrange();
}

function follow(event) {
  const box = $("view").getBoundingClientRect();
  move(Math.min(100, Math.max(0, (100 * (event.clientX - box.left)) / box.width)));
}

function dragging(element, begin, go) {
  element.addEventListener("pointerdown", (event) => {
    if (event.button !== 0 || begin(event) === false) return;
    element.setPointerCapture(event.pointerId);
    const moved = (each) => go(each);
    element.addEventListener("pointermove", moved);
    const end = () => {
      element.removeEventListener("pointermove", moved);
      $("view").classList.remove("dragged");
    };
    element.addEventListener("pointerup", end, { once: true });
    element.addEventListener("pointercancel", end, { once: true });
  });
}

dragging(document.querySelector("#divider span"), follow, follow);
dragging($("view"), (event) => {
  if ($("view").className === "fit") follow(event);
  else if (event.pointerType !== "mouse") return false; // a finger scrolls by itself
  else $("view").classList.add("dragged");
}, (event) => {
  if ($("view").classList.contains("fit")) follow(event);
  else $("view").scrollBy(-event.movementX, -event.movementY);
});
$("slider").addEventListener("input", () => move(Number($("slider").value)));
$("view").addEventListener("scroll", arrange);
new ResizeObserver(() => $("result").hidden || arrange()).observe($("view"));
$("fit").addEventListener("click", () => zoom(false));
$("full").addEventListener("click", () => zoom(true));
$("cancel").addEventListener("click", () => {
  if (request) request.abort();
  stop();
});

// Ways in.
const take = (files) => {
  $("progress").hidden = $("cancel").hidden = false;
  if (files && files.length) restore(files[0]);
};
$("file").addEventListener("change", () => {
  take($("file").files);
  $("file").value = ""; // so that the same photo can be sent again
});
$("form").addEventListener("submit", (event) => event.preventDefault());
$("token").addEventListener("change", learn);
for (const name of ["dragenter", "dragover"]) {
  addEventListener(name, (event) => {
    event.preventDefault();
    $("drop").classList.add("over");
  });
}
addEventListener("dragleave", (event) => event.relatedTarget || $("drop").classList.remove("over"));
addEventListener("drop", (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  take(event.dataTransfer.files);
});
addEventListener("paste", (event) => take([...event.clipboardData.files]));

learn();
