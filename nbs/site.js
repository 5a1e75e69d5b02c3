// Draws the figures of a page: every element of class plotly-figure holds a figure as JSON in data-figure.
(() => {
  const places = [...document.querySelectorAll(".plotly-figure")];
  if (!places.length) return;
  // What is black on white in the light theme.
  const dark = { "#000000": "#e8e8e8", "#555555": "#b0b0b0", "rgb(36,36,36)": "#d0d0d0", '"white"': '"rgba(0,0,0,0)"' };
  const isDark = () => document.body.classList.contains("quarto-dark");
  const draw = (place) => {
    let text = place.dataset.figure;
    if (isDark()) for (const [from, to] of Object.entries(dark)) text = text.replaceAll(from, to);
    const { data, layout } = JSON.parse(text);
    layout.autosize = true;
    layout.paper_bgcolor = layout.plot_bgcolor = "rgba(0,0,0,0)";
    layout.font = { ...layout.font, color: isDark() ? "#e8e8e8" : "#222222" };
    if (matchMedia("(pointer: coarse)").matches) layout.dragmode = false;  // a finger scrolls the page
    Plotly.react(place, data, layout, { responsive: true, displaylogo: false, displayModeBar: false });
  };
  const script = document.createElement("script");
  script.src = "plotly.min.js";
  script.onload = () => {
    places.forEach(draw);
    let was = isDark();
    new MutationObserver(() => { if (was !== isDark()) { was = isDark(); places.forEach(draw); } })
      .observe(document.body, { attributes: true, attributeFilter: ["class"] });
  };
  script.onerror = () => places.forEach((place) => { place.textContent = "plotly.min.js is missing from this folder"; });
  document.head.append(script);
})();
