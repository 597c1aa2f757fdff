"use strict";
// What /openapi.json says, for people. Nothing from elsewhere, where the usual viewers come from.

function element(name, text, ...children) {
  const made = document.createElement(name);
  if (text) made.textContent = text;
  made.append(...children);
  return made;
}

function table(titles, rows) {
  const head = element("thead", "", element("tr", "", ...titles.map((title) => element("th", title))));
  const lines = rows.map((cells) => element("tr", "", ...cells.map((cell, index) =>
    element("td", "", index ? cell : element("code", cell)))));
  const box = element("div", "", element("table", "", head, element("tbody", "", ...lines)));
  box.className = "table";
  return box;
}

function range(schema) {
  if (schema.enum) return schema.enum.join(", ");
  if (schema.minimum !== undefined) return `${schema.minimum} to ${schema.maximum}`;
  return schema.type;
}

function route(path, method, told) {
  const title = element("h2", "", element("b", method.toUpperCase()), element("code", path));
  const parts = [title, element("p", told.summary)];
  if (told.description) parts.push(element("p", told.description));
  if (told.requestBody) {
    const kinds = Object.keys(told.requestBody.content).join(" or ");
    parts.push(element("p", `Body: ${kinds}`));
    const curl = `curl -F image=@photo.jpg ${location.origin}${path} -o restored.jpg`;
    parts.push(element("pre", curl));
  }
  if (told.parameters) {
    parts.push(table(["Option", "Values", "Default", ""], told.parameters.map((each) =>
      [each.name, range(each.schema), String(each.schema.default ?? "–"), each.description])));
  }
  const headers = Object.entries(told.responses["200"].headers ?? {});
  if (headers.length) parts.push(table(["Header", ""], headers.map(([name, each]) => [name, each.description])));
  parts.push(table(["Answer", ""], Object.entries(told.responses).map(([code, each]) => [code, each.description])));
  return element("article", "", ...parts);
}

fetch("openapi.json").then((answer) => answer.json()).then((told) => {
  const routes = Object.entries(told.paths).flatMap(([path, methods]) =>
    Object.entries(methods).map(([method, each]) => route(path, method, each)));
  document.getElementById("routes").replaceChildren(element("p", told.info.description), ...routes);
}).catch(() => {
  document.getElementById("routes").replaceChildren(element("p", "The service does not answer."));
});
