// Cividis (Nuñez, Anderton and Renslow 2018) at 0, 1/4 ... 1: even in lightness, for all kinds of colour vision.
const RAMP = [[0, 34, 78], [67, 78, 108], [125, 124, 120], [188, 175, 111], [254, 232, 56]];

function colour(share) {
  const at = Math.min(1, Math.max(0, share)) * (RAMP.length - 1), i = Math.min(RAMP.length - 2, Math.floor(at));
  return RAMP[i].map((low, c) => Math.round(low + (at - i) * (RAMP[i + 1][c] - low)));
}

function element(name, properties, ...children) {
  const node = Object.assign(document.createElement(name), properties);
  node.append(...children);
  return node;
}

// A cell for each value; `values[row][column]` in 0 ... `most`, or null. `say(row, column)` is read on pointing at it.
function heatmap(values, most, say, reading) {
  const canvas = element("canvas", { width: values[0].length, height: values.length });
  const context = canvas.getContext("2d"), image = context.createImageData(canvas.width, canvas.height);
  values.flat().forEach((value, i) => image.data.set(value === null ? [0, 0, 0, 0] : [...colour(value / most), 255], 4 * i));
  context.putImageData(image, 0, 0);
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    const column = Math.min(canvas.width - 1, Math.max(0, Math.floor(((event.clientX - box.left) / box.width) * canvas.width)));
    const row = Math.min(canvas.height - 1, Math.max(0, Math.floor(((event.clientY - box.top) / box.height) * canvas.height)));
    byId(reading).textContent = say(row, column);
  });
  return canvas;
}

function drawLoads() {
  for (const { phase, steps, numbers, layers } of DATA.loads) {
    const rows = layers.map((load, place) => {
      const layer = numbers[place];
      const say = (expert, i) => `${phase}, step ${steps[i]}: layer ${layer}, expert ${expert}: ${load[expert][i]} of the fair share`;
      return element("div", { className: "layer" }, element("span", { textContent: `layer ${layer}` }), heatmap(load, 2, say, "load-reading"));
    });
    const shown = element("div", { className: "layer" }, element("span", {}), element("span", { textContent: `steps ${steps[0]} to ${steps.at(-1)}` }));
    byId("loads").append(element("div", {}, element("h3", { textContent: phase }), ...rows, shown));
  }
}

function drawMaps() {
  const one = DATA.experts[byId("checkpoint").value];
  if (byId("layer").options.length !== one.layers.length) options(byId("layer"), one.layers.map(({ layer }, i) => layer ?? i));
  const layer = one.layers[byId("layer").value], n = layer.load.length;
  const pairs = layer.together.flatMap((row, i) => row.map((share, j) => ({ i, j, share }))).filter(({ i, j }) => i !== j);
  const chosen = (i) => layer.together[i][i];
  // Had every token chosen its experts without regard to each other: a pair's share goes with the product of theirs.
  const sum = (values) => values.reduce((total, value) => total + value, 0);
  const unit = sum(pairs.map(({ share }) => share)) / sum(pairs.map(({ i, j }) => chosen(i) * chosen(j)));
  const lift = layer.together.map((row, i) => row.map((share, j) => (i === j ? null : share / (unit * chosen(i) * chosen(j) || 1))));
  const pair = (i, j) => `experts ${i} and ${j}: `;
  byId("together").replaceChildren(heatmap(lift, 2, (i, j) => i === j ? `expert ${i}: chosen by ${(100 * chosen(i)).toFixed(1)} % of the tokens`
    : `${pair(i, j)}chosen together by ${(100 * layer.together[i][j]).toFixed(1)} % of the tokens, ${lift[i][j].toFixed(2)} times what their loads give`, "map-reading"));
  const furthest = Math.max(...layer.distance.flat()) || 1;
  byId("distance").replaceChildren(heatmap(layer.distance.map((row, i) => row.map((value, j) => (i === j ? null : value))), furthest,
    (i, j) => i === j ? `expert ${i}` : `${pair(i, j)}${layer.distance[i][j]} apart`, "map-reading"));
  byId("map-reading").textContent = `Colours from 0 to twice, and from 0 to ${compact(furthest)}.`;
  byId("tokens").tBodies[0].replaceChildren(...layer.tokens.map((tokens, expert) => element("tr", {},
    element("td", { textContent: expert }),
    element("td", { textContent: (n * layer.load[expert]).toFixed(2) }),
    element("td", {}, ...tokens.flatMap((token) => [
      element("span", {}, element("code", { textContent: token.text.replaceAll("\n", "↵"), title: `${token.occurrences} times in the text; chosen for ${(100 * token.share).toFixed(0)} %` }),
        element("small", { textContent: token.lift.toFixed(1) })), " "])))));
}

if (DATA.loads.length) drawLoads();
if (DATA.experts.length) {
  options(byId("checkpoint"), DATA.experts.map((one) => one.name));
  byId("checkpoint").value = DATA.experts.length - 1;
  for (const id of ["checkpoint", "layer"]) byId(id).addEventListener("input", drawMaps);
  drawMaps();
}
