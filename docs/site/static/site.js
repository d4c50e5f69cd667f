// What the pages do themselves: draw Plotly's figures, and tell the players' frames the theme and their height.
(() => {
  const beside = new URL(".", document.currentScript.src);
  const root = document.documentElement;

  // -- players: the frame says how tall it is, the page says whether it is dark. Messages also work from file://
  const frames = () => [...document.querySelectorAll("iframe.se-player")];
  const tell = (frame) => frame.contentWindow.postMessage({ stepengine: { dark: root.dataset.theme === "dark" } }, "*");
  addEventListener("message", (event) => {
    const frame = frames().find((one) => one.contentWindow === event.source);
    const said = event.data && event.data.stepengine;
    if (!frame || !said) return;
    if (said.ready) tell(frame);
    if (frame.dataset.width !== String(frame.clientWidth)) frame.dataset.tallest = 0;
    frame.dataset.width = frame.clientWidth;
    frame.dataset.tallest = Math.max(Number(frame.dataset.tallest) || 0, Math.ceil(said.height));
    frame.style.height = `${frame.dataset.tallest}px`; // it only grows: the page does not jump from step to step
  });
  new MutationObserver(() => frames().forEach(tell)).observe(root, { attributes: true, attributeFilter: ["data-theme"] });

  // -- figures: the data stand in the page, one copy of plotly.js in the site, fetched only where it is needed
  const draw = () => {
    for (const figure of document.querySelectorAll("figure.se-plot")) {
      const { data, layout, frames, config } = JSON.parse(figure.querySelector("script").textContent);
      const room = Math.max(600, figure.clientWidth); // narrower than this, the figure scrolls in its box
      if (layout.width) layout.width = Math.min(layout.width, room);
      Plotly.newPlot(figure.querySelector(".se-canvas"), { data, layout, frames, config });
    }
  };
  document.addEventListener("DOMContentLoaded", () => {
    if (!document.querySelector("figure.se-plot")) return;
    const script = document.createElement("script");
    script.src = new URL("plotly.min.js", beside);
    script.onload = draw;
    document.head.append(script);
  });
})();
