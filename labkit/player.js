(() => {
  const store = (window.labPredictions ||= {});
  const remember = (key, value) => {
    store[key] = value;
    try { sessionStorage.setItem("lab:" + key, value); } catch { /* no storage: kept for this page only */ }
  };
  const recall = (key) => {
    try { return store[key] ?? sessionStorage.getItem("lab:" + key); } catch { return store[key]; }
  };

  function play(figure, data) {
    const items = figure.querySelectorAll(".x"), inputs = [...figure.querySelectorAll("input, select")];
    const stage = figure.querySelector(".lab-stage"), text = figure.querySelector(".lab-text");
    const button = (name) => figure.querySelector(`button[data-go="${name}"]`);
    let current = data.key, timer = null;

    function draw(frame) {
      data.frames[frame].forEach((state, i) => {
        const [look, label, style] = data.states[state];
        items[i].className = "x " + look;
        items[i].textContent = label;
        items[i].style.cssText = style;
      });
      text.textContent = data.texts[frame];
      stage?.setAttribute("aria-label", data.texts[frame]);
    }
    function update() {
      current = 0;
      inputs.forEach((input, c) => {
        current = current * data.options[c].length + Number(input.value);
        const label = data.options[c][input.value], output = input.parentNode.querySelector("output");
        if (output) { output.textContent = label; input.setAttribute("aria-valuetext", label); }
      });
      if (button("back")) {
        const last = data.frames.length - 1;
        button("first").disabled = button("back").disabled = current === 0;
        button("next").disabled = button("last").disabled = current === last;
        if (current === last) stop();
      }
      draw(current);
    }
    function go(value) {
      inputs[0].value = Math.max(0, Math.min(data.frames.length - 1, value));
      update();
    }
    function stop() {
      clearInterval(timer);
      timer = null;
      if (button("play")) { button("play").textContent = "Play"; }
    }
    const actions = {
      first: () => go(0), back: () => go(current - 1), next: () => go(current + 1), last: () => go(data.frames.length - 1),
      play() {
        if (timer) return stop();
        if (current === data.frames.length - 1) go(0);
        button("play").textContent = "Pause";
        timer = setInterval(() => (figure.isConnected ? go(current + 1) : stop()), 900);
      },
    };
    figure.addEventListener("click", (event) => {
      const name = event.target.dataset.go;
      if (!name) return;
      if (name !== "play") stop();
      actions[name]();
      if (event.target.disabled) inputs[0].focus(); // a disabled button would swallow the next key
    });
    figure.addEventListener("input", () => { stop(); update(); });
    figure.addEventListener("keydown", (event) => {
      event.stopPropagation(); // the page and JupyterLab have keys of their own
      const name = { ArrowLeft: "back", ArrowRight: "next", Home: "first", End: "last" }[event.key];
      if (!name || !button("back") || event.target.matches("input, select")) return;
      event.preventDefault();
      stop();
      actions[name]();
      if (event.target.disabled) inputs[0].focus();
    });
    window.addEventListener("beforeprint", () => draw(data.key));
    window.addEventListener("afterprint", () => draw(current));
    figure.querySelector(".lab-controls").hidden = false;
    update();
  }

  function predict(figure, data) {
    const input = figure.querySelector("input"), button = figure.querySelector("button");
    const text = figure.querySelector(".lab-text");
    const commit = (value) => {
      remember(data.predict, value);
      input.value = value;
      input.disabled = button.disabled = true;
      text.textContent = `Noted: ${value} ${data.unit}. The answer comes further down the page.`;
      document.dispatchEvent(new CustomEvent("lab-predicted"));
    };
    const send = () => {
      if (input.value === "" || !input.checkValidity()) text.textContent = "Type a number first.";
      else commit(input.value);
    };
    button.addEventListener("click", send);
    figure.addEventListener("keydown", (event) => {
      event.stopPropagation();
      if (event.key === "Enter") { event.preventDefault(); send(); }
    });
    figure.querySelector(".lab-controls").hidden = false;
    const known = recall(data.predict);
    if (known != null) commit(known); else text.textContent = "";
  }

  function reveal(figure, data) {
    const text = figure.querySelector(".lab-yours");
    const compare = () => {
      const yours = recall(data.reveal);
      if (yours == null) {
        const asked = [...document.querySelectorAll("[data-predict]")].find((f) => f.dataset.predict === data.reveal);
        const link = document.createElement(asked ? "a" : "span");
        link.textContent = "You have not committed to a number yet.";
        if (asked) {
          link.href = "#" + (asked.id ||= "predict-" + data.reveal);
          link.addEventListener("click", (event) => {
            event.preventDefault(); // JupyterLab would take the address for one of its own
            asked.scrollIntoView({ block: "center" });
            asked.querySelector("input").focus({ preventScroll: true });
          });
        }
        text.replaceChildren(link);
        return;
      }
      const ratio = Number(yours) / data.answer, off = Number((Number(yours) - data.answer).toPrecision(3));
      const times = (x) => (x < 100 ? x.toPrecision(2) : Math.round(x).toLocaleString("en"));
      const verdict = data.answer == null ? "Nobody has measured that yet."
        : !(ratio > 0) || ratio === Infinity ? `That is ${Math.abs(off)} too ${off > 0 ? "high" : "low"}.`
        : Math.abs(ratio - 1) < 0.05 ? "Within 5 %."
        : ratio > 1 ? `That is ${times(ratio)} times too high.` : `That is ${times(1 / ratio)} times too low.`;
      text.textContent = `You predicted ${yours} ${data.unit}. ${verdict}`;
    };
    document.addEventListener("lab-predicted", compare);
    compare();
  }

  document.querySelectorAll(".lab-player:not([data-ready])").forEach((figure) => {
    const script = figure.querySelector('script[type="application/json"]');
    if (!script) return;
    figure.dataset.ready = "";
    const data = JSON.parse(script.textContent);
    (data.frames ? play : data.predict ? predict : reveal)(figure, data);
  });
})();
