(() => {
  "use strict";
  const root = document.documentElement;

  // Whatever goes wrong is written on the root element, where a test or a person can read it.
  window.__errors = [];
  root.dataset.errors = "0";
  const fail = (text) => {
    window.__errors.push(text);
    root.dataset.errors = String(window.__errors.length);
    root.dataset.lastError = text;
  };
  addEventListener("error", (event) => fail(String(event.message || event.type)));
  addEventListener("unhandledrejection", (event) => fail(String(event.reason)));
  document.addEventListener("securitypolicyviolation", (event) =>
    fail(`policy: ${event.violatedDirective} ${event.blockedURI}`));

  // Theme: what the reader chose, else what the system says.
  const KEY = "residency-theme";
  const THEMES = ["auto", "light", "dark"];
  let theme = "auto";
  try { theme = localStorage.getItem(KEY) || "auto"; } catch { /* no storage for this page */ }
  if (!THEMES.includes(theme)) theme = "auto";
  const applyTheme = (name) => {
    if (name === "auto") delete root.dataset.theme; else root.dataset.theme = name;
  };
  applyTheme(theme);

  const colour = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const colourway = () => [1, 2, 3, 4, 5, 6, 7, 8].map((i) => colour(`--c${i}`));

  function template() {
    const axis = {
      gridcolor: colour("--line"), linecolor: colour("--line-strong"), zeroline: false,
      showline: true, ticks: "outside", ticklen: 4, tickcolor: colour("--line-strong"),
      automargin: true, title: { standoff: 10, font: { size: 12.5 } }, tickfont: { size: 12 },
    };
    const scale = [[0, colour("--wash")], [0.5, colour("--c7")], [1, colour("--c3")]];
    return {
      data: {
        heatmap: [{ colorscale: scale, colorbar: { thickness: 10, outlinewidth: 0 }, xgap: 1, ygap: 1 }],
        bar: [{ marker: { line: { width: 0 } } }],
      },
      layout: {
        font: { family: getComputedStyle(document.body).fontFamily, size: 12.5, color: colour("--muted") },
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", colorway: colourway(),
        modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("--line-strong"), activecolor: colour("--accent") },
        xaxis: axis, yaxis: axis, bargap: 0.25,
        margin: { l: 40, r: 16, t: 14, b: 30 },
        legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", itemsizing: "constant" },
        hoverlabel: {
          align: "left", bgcolor: colour("--card"), bordercolor: colour("--line-strong"),
          font: { color: colour("--ink"), size: 12.5 },
        },
      },
    };
  }

  // "var(--accent)" in a figure means the page's colour of that name, in the theme of the moment.
  function themed(value) {
    if (typeof value === "string") {
      const found = /^var\((--[\w-]+)\)$/.exec(value);
      return found ? colour(found[1]) : value;
    }
    if (Array.isArray(value)) return typeof value[0] === "object" ? value.map(themed) : value.slice();
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, entry]) => [key, themed(entry)]));
    }
    return value;
  }

  let charts = [];
  let tables = {};
  const shown = {};

  function draw(chart, width) {
    const box = document.getElementById(chart.id);
    const variant = chart.variants[shown[chart.id] || 0];
    const layout = { ...themed(variant.layout), template: template(), autosize: !width };
    if (width) layout.width = width;
    const config = {
      responsive: true, displaylogo: false,
      displayModeBar: matchMedia("(hover: hover)").matches ? "hover" : false,
      modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d", "zoomIn2d", "zoomOut2d"],
    };
    try {
      const note = box.querySelector("noscript");
      if (note) note.remove();
      return window.Plotly.react(box, variant.data.map(themed), layout, config).catch((error) => fail(String(error)));
    } catch (error) {
      fail(`${chart.id}: ${error}`);
      return Promise.resolve();
    }
  }

  async function drawAll() {
    let done = 0;
    for (const chart of charts) {
      await draw(chart);
      root.dataset.charts = String(++done);
      await new Promise((resume) => setTimeout(resume, 0)); // let the reader scroll meanwhile
    }
    root.dataset.drawn = "yes";
  }

  function startTheme() {
    const button = document.getElementById("theme");
    const show = () => { button.textContent = `Theme: ${theme}`; };
    button.hidden = false;
    show();
    button.addEventListener("click", () => {
      theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
      try { localStorage.setItem(KEY, theme); } catch { /* the choice lasts as long as the page */ }
      applyTheme(theme);
      show();
      charts.forEach((chart) => draw(chart));
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
      if (theme === "auto") charts.forEach((chart) => draw(chart));
    });
  }

  function startChoices() {
    for (const button of document.querySelectorAll("button[data-chart]")) {
      button.addEventListener("click", () => {
        for (const other of button.parentElement.children) {
          other.setAttribute("aria-pressed", String(other === button));
        }
        shown[button.dataset.chart] = Number(button.dataset.variant);
        draw(charts.find((chart) => chart.id === button.dataset.chart));
      });
    }
  }

  const LIMIT = 200;
  function startFilters() {
    for (const input of document.querySelectorAll("input[data-filter]")) {
      const rows = tables[input.dataset.filter] || [];
      const text = rows.map((row) => row.join("\u0000").toLowerCase());
      const body = document.querySelector(`#${input.dataset.filter} tbody`);
      const status = document.getElementById(`${input.dataset.filter}-count`);
      input.parentElement.hidden = false;
      input.addEventListener("input", () => {
        const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
        const found = rows.filter((_, i) => words.every((word) => text[i].includes(word)));
        body.replaceChildren(...found.slice(0, LIMIT).map((row) => {
          const line = document.createElement("tr");
          line.append(...row.map((cell) => {
            const box = document.createElement("td");
            box.textContent = cell;
            return box;
          }));
          return line;
        }));
        const of = words.length ? `${found.length} of ${rows.length} rows match` : `${rows.length} rows`;
        status.textContent = found.length > LIMIT ? `${of}; the first ${LIMIT} are shown` : of;
      });
    }
  }

  // On paper: light, everything unfolded, charts as wide as the sheet.
  function startPrint() {
    let closed = [];
    addEventListener("beforeprint", () => {
      closed = [...document.querySelectorAll("details:not([open])")];
      closed.forEach((details) => { details.open = true; });
      applyTheme("light");
      charts.forEach((chart) => draw(chart, 640));
    });
    addEventListener("afterprint", () => {
      closed.forEach((details) => { details.open = false; });
      applyTheme(theme);
      charts.forEach((chart) => draw(chart));
    });
  }

  document.addEventListener("DOMContentLoaded", () => {
    ({ charts, tables } = JSON.parse(document.getElementById("payload").textContent));
    startTheme();
    startChoices();
    startFilters();
    startPrint();
    drawAll();
  });
})();
