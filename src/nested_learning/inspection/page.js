// Colours the text by the chosen number. The choice stands in the address, as #0.k/eta or #0.k/eta/17.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const tokens = [...document.querySelectorAll("#text > span")];
const find = (id) => document.getElementById(id);
const radios = [...document.querySelectorAll("#values input")];
const names = { surprise: "surprise", eta: "η", alpha: "α", contribution: "contribution" };

function chosen() {
  return { memory: find("memory").value, value: radios.find((radio) => radio.checked).value };
}

function numbers({ memory, value }) {
  return memory === "loss" ? data.loss : data.memories[memory].values[value];
}

function show(number) {
  return number === null ? "–" : String(number);
}

function colour() {
  const choice = chosen(), { low, high, of } = numbers(choice);
  const ends = new Set(choice.memory === "loss" ? [] : data.memories[choice.memory].ends);
  find("values").classList.toggle("off", choice.memory === "loss");
  find("low").textContent = low.toPrecision(3);
  find("high").textContent = high.toPrecision(3);
  tokens.forEach((token, i) => {
    const share = high > low && of[i] !== null ? (of[i] - low) / (high - low) : 0;
    token.style.setProperty("--v", Math.min(Math.max(share, 0), 1).toFixed(2));
    token.classList.toggle("none", of[i] === null);
    token.classList.toggle("end", ends.has(i + 1));
  });
}

function tell(i) {
  const { memory } = chosen(), word = document.createElement("b");
  word.textContent = JSON.stringify(tokens[i].textContent);
  const parts = [`token ${i}`, `loss ${show(data.loss.of[i])}`];
  if (memory !== "loss") {
    const { label, values } = data.memories[memory];
    parts.push(label, ...Object.keys(names).map((name) => `${names[name]} ${show(values[name].of[i])}`));
  }
  find("about").replaceChildren(word, " · " + parts.join(" · "));
}

function follow() {
  const [memory, value, place] = location.hash.slice(1).split("/").map(decodeURIComponent);
  if (memory !== "loss" && !(memory in data.memories)) return;
  find("memory").value = memory;
  radios.forEach((radio) => { radio.checked = radio.value === (value || "contribution"); });
  colour();
  if (memory !== "loss") find("panel").scrollIntoView({ block: "nearest" });
  tokens.forEach((token) => token.classList.remove("here"));
  if (place in tokens) {
    tokens[place].classList.add("here");
    tokens[place].scrollIntoView({ block: "center" });
    tell(Number(place));
  }
}

function choose() {
  const { memory, value } = chosen();
  history.replaceState(null, "", "#" + (memory === "loss" ? "loss" : `${encodeURIComponent(memory)}/${value}`));
  colour();
}

find("memory").addEventListener("change", choose);
radios.forEach((radio) => radio.addEventListener("change", choose));
find("text").addEventListener("mouseover", (event) => {
  const token = event.target.closest("#text > span");
  if (token) tell(Number(token.id.slice(1)));
});
window.addEventListener("hashchange", follow);
colour();
follow();
