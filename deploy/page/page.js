// Set up a program, and see one answer. A key is read from its field for each call, and stands nowhere else.
const $ = (id) => document.getElementById(id);
const here = location.origin;

const VENDORS = {
  __proto__: null, // A model's name is looked up here.
  openai: { name: "OpenAI", key: "sk-…", path: "/openai/v1" },
  gemini: { name: "Gemini", key: "AI…", path: "/gemini/v1beta/openai" },
  anthropic: { name: "Anthropic", key: "sk-ant-…", path: "/anthropic/v1" },
};
const PROGRAMS = [...document.querySelectorAll("template")];
let models = []; // as GET /v1/models lists them
let tokens = false; // whether the gateway demands one
let closed = []; // the vendors whose native paths are

const vendorOf = (model) => model.split(/[-/]/)[0];
const chosen = (name) => document.querySelector(`input[name=${name}]:checked`)?.value;

// Use it

// What connects a program: one vendor's own API, or all of them at /v1, where keys are told apart by their names.
function connection() {
  const choice = chosen("vendor");
  const vendor = VENDORS[choice];
  const model = models.find((each) => !vendor || vendorOf(each.id) === choice);
  if (vendor && !closed.includes(choice) && !tokens) {
    const name = model?.custom_metadata?.provider_resource_id;
    const note = `This leads straight to ${vendor.name}: its own names for models, its parameters, its errors.`;
    return { here, base: here + vendor.path, key: vendor.key, model: name ?? "…", native: choice, note };
  }
  const keys = Object.keys(VENDORS).filter((name) => !vendor || name === choice).map((name) => `${name}=${VENDORS[name].key}`);
  const key = [...(tokens ? ["token=…"] : []), ...keys].join(";");
  const risk = "Leave out what you do not have. A program that ignores the base URL for one of its calls sends all of the keys there.";
  const why = tokens ? "Your team’s token goes first, and the vendors’ own APIs are closed." : vendor ? `${vendor.name}’s own API is closed here.` : "";
  const note = vendor ? why : `${why} ${risk}`.trim();
  return { here, base: `${here}/v1`, key, "key,": key.replaceAll(";", ","), model: model?.id ?? "…", note };
}

function showPrograms() {
  const { native } = connection();
  const wanted = chosen("program");
  const fitting = PROGRAMS.filter(({ dataset }) => !dataset.only || dataset.only === native);
  const kept = fitting.some(({ dataset }) => dataset.program === wanted);
  $("programs").replaceChildren($("programs").firstElementChild, ...fitting.map(({ dataset: { program } }, i) => {
    const input = Object.assign(document.createElement("input"), { type: "radio", name: "program", value: program });
    input.checked = kept ? program === wanted : i === 0;
    return element("label", input, element("span", program));
  }));
  showRecipe();
}

function showRecipe() {
  const given = connection();
  const { dataset, content } = PROGRAMS.find((each) => each.dataset.program === chosen("program"));
  for (const name of ["base", "key", "model", "note"]) $(`the-${name}`).textContent = given[name];
  $("where").textContent = dataset.where;
  $("recipe").textContent = content.textContent.trim().replace(/\{(here|base|key,?|model)\}/g, (_, name) => given[name] ?? given.key);
}

let forgotten; // when "Copied" is a button's word no more

async function copy(button) {
  const source = $(button.dataset.copy);
  try {
    await navigator.clipboard.writeText(source.textContent);
  } catch {
    // Without HTTPS, browsers have a clipboard for localhost alone.
    getSelection().selectAllChildren(source);
    document.execCommand("copy");
  }
  showNothingCopied();
  button.textContent = $("said").textContent = "Copied";
  clearTimeout(forgotten);
  forgotten = setTimeout(showNothingCopied, 2000);
}

function showNothingCopied() {
  document.querySelectorAll("[data-copy]").forEach((each) => (each.textContent = "Copy"));
  $("said").textContent = "";
}

// What the gateway says

const GONE = `The gateway does not answer at ${here}. Is it still running?`;

// The words in an error. The server tells a vendor's as Python prints it: Error code: 401 - {'error': {'message': '…'}}
function words(text) {
  let message = text;
  try {
    const body = JSON.parse(text);
    const found = [body.error?.message ?? body.error ?? body.detail ?? text].flat();
    message = found.map((each) => each.msg ?? (typeof each === "string" ? each : JSON.stringify(each))).join(" ");
  } catch { /* No JSON: told as it is. */ }
  const [, rest] = /^Error code: \d+ - (.*)$/s.exec(message) ?? [];
  const [, single, double] = /'message': (?:'((?:[^'\\]|\\.)*)'|"((?:[^"\\]|\\.)*)")/s.exec(rest) ?? [];
  const plain = (_, code) => code[1] ? String.fromCodePoint(parseInt(code.slice(1), 16)) : { n: "\n", r: "", t: "\t" }[code] ?? code;
  const said = (single ?? double)?.replace(/\\(x..|u.{4}|U.{8}|.)/gs, plain) ?? rest ?? message;
  return { said: said.trim() || "no words", vendor: rest !== undefined && !rest.includes("'egress_error'") };
}

const show = (id, kind, sentence) => Object.assign($(id), { className: `told ${kind}`, textContent: sentence });

function element(tag, ...content) {
  const made = document.createElement(tag);
  made.append(...content); // Strings become text, whatever is in them.
  return made;
}

const bearer = () => $("token").value.trim() && { Authorization: `Bearer ${plain("token", "token")}` };

// What is in a field, which has to fit into a header.
function plain(id, name) {
  const value = $(id).value.trim();
  if (/[^!-~]/.test(value)) throw new Error(`There is a space or an odd character in the ${name}.`);
  return value;
}

async function listModels() {
  try {
    const response = await fetch("/v1/models", { headers: { ...bearer() } });
    if (response.status === 401) return demandToken();
    if (!response.ok) throw new Error(words(await response.text()).said);
    closed = response.headers.get("Native-Closed")?.split(" ") ?? [];
    models = (await response.json()).data.filter((model) => model.custom_metadata?.model_type !== "embedding");
  } catch (error) {
    show("state", "bad", error instanceof TypeError ? GONE : error.message);
    return setTimeout(listModels, 3000);
  }
  show("state", "good", `It answers, and lists ${models.length} models. A vendor’s other models work too.`);
  const named = (model) => model.custom_metadata?.display_name ?? model.id;
  $("models").replaceChildren(...models.map((model) => element("li", named(model), element("code", model.id))));
  $("model").replaceChildren(...models.map((model) => new Option(named(model), model.id)), $("model").lastElementChild);
  $("model").selectedIndex = 0;
  showOther();
  showPrograms();
}

function demandToken() {
  tokens = true;
  $("tokens").hidden = false;
  const refused = "It refused this token, which may have expired.";
  show("state", "bad", $("token").value ? refused : "It answers, and asks for your team’s token: see Try it.");
  showPrograms();
}

// Try it

let call = null; // what stops the one that is running

const showOther = () => ($("others").hidden = $("model").value !== "");

function showBusy(busy) {
  const [from, to] = busy ? ["ask", "stop"] : ["stop", "ask"];
  $(to).disabled = false;
  if (document.activeElement === $(from)) $(to).focus(); // Disabling it would lose the keyboard's place.
  $(from).disabled = true;
  $("answer").setAttribute("aria-busy", busy);
}

// The header's content: the key of the model's vendor alone, or all where the provider's name does not tell the vendor.
function providerData(model) {
  if (!model) throw new Error("Which model? Its name has two parts: provider/model.");
  const vendors = VENDORS[vendorOf(model)] ? [vendorOf(model)] : Object.keys(VENDORS);
  const data = {};
  for (const vendor of vendors) {
    const key = plain(vendor, `${VENDORS[vendor].name} key`);
    if (key) data[`${vendor}_authorization`] = `Bearer ${key}`;
    if (key && vendor === "gemini") data.gemini_api_key = key;
  }
  if (Object.keys(data).length) return JSON.stringify(data);
  $(vendors[0]).focus();
  throw new Error(`Put in the ${VENDORS[vendors[0]].name} key first: this model is asked with it.`);
}

// Adds to the answer, and stays at its end unless somebody has scrolled up to read.
function add(text) {
  const box = $("answer");
  const atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 8;
  box.append(text);
  if (atEnd) box.scrollTop = box.scrollHeight;
}

// Shows a stream to its end. The server sends no [DONE]: finish_reason is complete, `error` failed, neither cut off.
async function read(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", finish;
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return { finish };
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    let text = "";
    for (const line of lines) {
      if (!/^data: *\{/.test(line)) continue;
      const { error, choices } = JSON.parse(line.slice(5));
      if (error) return add(text), { failed: words(line.slice(5)).said };
      text += choices?.[0]?.delta?.content ?? choices?.[0]?.delta?.refusal ?? "";
      finish = choices?.[0]?.finish_reason ?? finish;
    }
    if (text) add(text);
  }
}

async function ask(event) {
  event.preventDefault();
  if (call) return;
  const outcome = (kind, sentence) => show("outcome", kind, sentence);
  const model = $("model").value || $("other").value.trim();
  const began = Date.now();
  const after = () => `after ${((Date.now() - began) / 1000).toFixed(1)} s`;
  let answering = false;
  try {
    const headers = { "Content-Type": "application/json", "X-LlamaStack-Provider-Data": providerData(model), ...bearer() };
    const body = JSON.stringify({ model, messages: [{ role: "user", content: $("prompt").value }], stream: true });
    call = new AbortController();
    $("answer").replaceChildren();
    showBusy(true);
    outcome("", `Asking ${model} …`);
    const response = await fetch("/v1/chat/completions", { method: "POST", headers, body, signal: call.signal });
    if (!response.ok) {
      const { said, vendor } = words(await response.text());
      if (tokens && response.status === 401 && !vendor) demandToken();
      return outcome("bad", `${vendor ? VENDORS[vendorOf(model)]?.name ?? "The vendor" : "The gateway"} answered ${response.status}: ${said}`);
    }
    answering = true;
    outcome("", "Answering …");
    const { finish, failed } = await read(response.body);
    if (failed) outcome("bad", `The answer failed: ${failed}`);
    else if (!finish) outcome("bad", "The answer is cut off: it does not say that it is complete.");
    else outcome("good", finish === "stop" ? `Complete ${after()}.` : `The model ended it ${after()}: ${finish}.`);
  } catch (error) {
    if (error.name === "AbortError") outcome("", `Stopped ${after()}. The vendor may finish it all the same, and charge for it.`);
    else if (error instanceof SyntaxError) outcome("bad", "The gateway sent something that is no answer.");
    else if (error instanceof TypeError) outcome("bad", answering ? "The connection to the gateway broke: the answer is cut off." : GONE);
    else outcome("bad", error.message);
  } finally {
    if (call) showBusy(false);
    call = null;
  }
}

document.addEventListener("change", ({ target }) => {
  if (target.name === "vendor") showPrograms();
  if (target.name === "program") showRecipe();
  if (target.id === "model") showOther();
  if (target.id === "token") listModels();
});
document.addEventListener("click", ({ target }) => target.dataset.copy && copy(target));
$("form").addEventListener("submit", ask);
$("stop").addEventListener("click", () => call?.abort());
$("prompt").addEventListener("keydown", (event) => event.key === "Enter" && (event.ctrlKey || event.metaKey) && ask(event));
// A browser may keep a page that was left in memory, with its fields.
addEventListener("pagehide", () => ($("form").reset(), showOther()));

showPrograms();
listModels();
