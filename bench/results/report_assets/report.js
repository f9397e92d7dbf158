"use strict";
// Draws the plots of the panels that are shown, in the colours of the theme; nothing else.
(function () {
  const plots = JSON.parse(document.getElementById("plots").textContent);
  const root = document.documentElement;
  const drawn = new Set();
  const config = {
    displaylogo: false, responsive: true, showLink: false, showEditInChartStudio: false, showSendToCloud: false,
    plotlyServerURL: "", topojsonURL: "", modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d", "sendDataToCloud"],
    toImageButtonOptions: { format: "svg" },
  };

  function colour(name) { return getComputedStyle(root).getPropertyValue(name).trim(); }

  function axes(layout) { return Object.keys(layout).filter((key) => /^[xy]axis\d*$/.test(key)); }

  // The colours of the theme as a flat update of a layout.
  function themed(layout) {
    const update = {
      "font.color": colour("--ink"), "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)",
      "hoverlabel.bgcolor": colour("--paper"), "hoverlabel.font.color": colour("--ink"), "hoverlabel.bordercolor": colour("--soft"),
      "modebar.color": colour("--soft"), "modebar.activecolor": colour("--accent"), "modebar.bgcolor": "rgba(0,0,0,0)",
    };
    for (const axis of axes(layout)) {
      update[axis + ".gridcolor"] = colour("--grid");
      update[axis + ".zerolinecolor"] = colour("--line");
      update[axis + ".linecolor"] = colour("--line");
    }
    return update;
  }

  function set(target, path, value) {
    const keys = path.split(".");
    const last = keys.pop();
    for (const key of keys) { target = target[key] = target[key] || {}; }
    target[last] = value;
  }

  function get(target, path) { return path.split(".").reduce((at, key) => (at === undefined ? at : at[key]), target); }

  function draw(element) {
    if (drawn.has(element.id)) { return Plotly.Plots.resize(element); }
    drawn.add(element.id);
    const { data, layout } = plots[element.id];
    const base = {
      margin: { l: 58, r: layout.yaxis2 && layout.yaxis2.side === "right" ? 58 : 14, t: 26, b: 48 },
      font: { family: getComputedStyle(document.body).fontFamily, size: 12 }, hovermode: "closest", showlegend: true,
      legend: { orientation: "h", yref: "container", y: 0, yanchor: "bottom", x: 0, font: { size: 11 } },
    };
    const whole = Object.assign({}, base, layout, { legend: Object.assign({}, base.legend, layout.legend) });
    for (const axis of axes(whole)) { whole[axis] = Object.assign({ automargin: true }, whole[axis]); }
    for (const axis of axes(whole)) { whole[axis].dtick = ticks(whole[axis].type); }
    for (const [path, value] of Object.entries(themed(whole))) { set(whole, path, value); }
    return Plotly.newPlot(element, data, whole, config).then(() => { mark(element); });
  }

  // 1, 2 and 5 of each decade; plotly's own choice sets nine figures so small that nobody reads them.
  function ticks(type) { return type === "log" ? "D2" : null; }

  function mark(element) {
    for (const button of document.querySelectorAll('button[data-plot="' + element.id + '"]')) {
      button.setAttribute("aria-pressed", String(String(get(element, button.dataset.key)) === button.dataset.on));
    }
  }

  function shown() { return [...document.querySelectorAll(".panel:not([hidden]) .plot")]; }

  function drawShown() { return Promise.all(shown().map(draw)); }

  function retheme() {
    for (const id of drawn) { Plotly.relayout(id, themed(document.getElementById(id).layout)); }
  }

  for (const select of document.querySelectorAll("select[data-section]")) {
    select.addEventListener("change", () => {
      const section = select.dataset.section;
      for (const panel of document.querySelectorAll('.panel[data-panel^="' + section + '-"]')) {
        panel.hidden = panel.dataset.panel !== section + "-" + select.value;
      }
      drawShown();
    });
  }

  for (const button of document.querySelectorAll("button[data-plot]")) {
    button.addEventListener("click", () => {
      const element = document.getElementById(button.dataset.plot);
      const { key, on, off } = button.dataset;
      const value = button.getAttribute("aria-pressed") === "true" ? off : on;
      const [where, what, ...rest] = key.split(".");
      const change = where === "data"
        ? Plotly.restyle(element, { [rest.join(".")]: value === "true" ? true : value }, [Number(what)])
        // The old range is of the other scale: let plotly find a new one.
        : Plotly.relayout(element, {
          [what + "." + rest.join(".")]: value, [what + ".autorange"]: true, [what + ".dtick"]: ticks(value),
        });
      change.then(() => { mark(element); });
    });
  }

  const dark = matchMedia("(prefers-color-scheme: dark)");
  dark.addEventListener("change", retheme);
  document.getElementById("theme").addEventListener("click", () => {
    const now = root.dataset.theme || (dark.matches ? "dark" : "light");
    root.dataset.theme = now === "dark" ? "light" : "dark";
    retheme();
  });

  // Paper is white and narrow.
  let themeBefore;
  addEventListener("beforeprint", () => {
    themeBefore = root.dataset.theme;
    root.dataset.theme = "light";
    retheme();
    for (const element of shown()) { Plotly.relayout(element, { width: 680, autosize: false }); }
  });
  addEventListener("afterprint", () => {
    if (themeBefore === undefined) { delete root.dataset.theme; } else { root.dataset.theme = themeBefore; }
    retheme();
    for (const element of shown()) { Plotly.relayout(element, { width: null, autosize: true }); }
  });

  drawShown().then(() => { root.dataset.plots = "drawn"; });
})();
