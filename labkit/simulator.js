(() => {
  const functions = {
    min: Math.min, max: Math.max, ceil: Math.ceil, floor: Math.floor,
    harmonic: (n) => { let sum = 0; for (let i = 1; i <= n; i++) sum += 1 / i; return sum; },
  };
  // An expression of step_model.FORMULAS is JavaScript as well as Python.
  const compile = (expression) => {
    const names = [...new Set(expression.match(/[a-z]\w*/g))];
    const code = new Function(...names, "return " + expression);
    return (known) => code(...names.map((name) => known[name] ?? functions[name]));
  };
  const thousands = (text) => text.replace(/\B(?=(\d{3})+(?!\d))(?<!\.\d*)/g, ",");
  const shown = (value, times, decimals, unit) => (thousands((value * times).toFixed(decimals)) + " " + unit).trim();

  function start(figure) {
    const data = JSON.parse(figure.querySelector('script[type="application/json"]').textContent);
    const formulas = Object.entries(data.formulas).map(([name, expression]) => [name, compile(expression)]);
    const inputs = [...figure.querySelectorAll(".lab-controls input, .lab-controls select")];
    const items = figure.querySelectorAll(".x"), text = figure.querySelector(".lab-text");
    const stage = figure.querySelector(".lab-stage"), options = Object.values(data.controls);

    function step(model, device, context, batch, switches) {
      const known = { ...data.models[model], ...data.devices[device], context, batch };
      Object.keys(data.techniques).forEach((name, i) => { known[name] = switches[i]; });
      formulas.forEach(([name, formula]) => { known[name] = formula(known); });
      return known;
    }
    function bar(item, lane, color, from, to) {
      item.className = "x " + (to > from ? color : "");
      item.style.cssText = `left:${from / 1.2}%;width:${(to - from) / 1.2}%;top:${50 * lane}%`;
    }
    const value = (input) => Number(input.type === "checkbox" ? input.checked : input.value);
    function update() {
      const choice = inputs.map((input, i) => options[i][value(input)]);
      inputs.forEach((input, i) => {
        const output = input.parentNode.querySelector("output");
        if (output) { output.textContent = choice[i]; input.setAttribute("aria-valuetext", choice[i]); }
      });
      const switches = inputs.slice(4).map(value);
      const steps = [switches.map(() => 0), switches].map((s) => step(...choice.slice(0, 4), s));
      let slowest = null, times = 7; // six bars of the memory and its line come first
      steps.forEach((s, lane) => {
        const sums = [0, s.weights, s.weights + s.used, s.weights + s.used + s.empty];
        const cuts = sums.map((sum) => Math.min(120, (100 * sum) / s.memory));
        ["sky", "blue", "orange"].forEach((color, i) => bar(items[3 * lane + i], lane, color, cuts[i], cuts[i + 1]));
        items[3 * lane].textContent = s.weights > data.full * s.memory ? "does not fit" : "";
        if (s.tokens) {
          slowest ??= 1 / s.tokens;
          bar(items[times++], lane, "green", 0, Math.min(120, 100 / s.tokens / slowest));
        }
        data.rows.forEach(([, name, ...form], i) => {
          const none = data.ofAStep.includes(name) && !s.running;
          items[9 + 2 * i + lane].textContent = none ? "-" : shown(s[name], ...form);
        });
      });
      for (; times < 9; times++) items[times].style.cssText = "display:none";
      const words = { batch: thousands(String(choice[3])) };
      data.rows.forEach(([, name, times, decimals]) => { words[name] = shown(steps[1][name], times, decimals, ""); });
      const labels = Object.values(data.techniques).filter((_, i) => switches[i]).join(", ") || "all off";
      words.choice = `${choice[0]} on ${choice[1]}, ${thousands(String(choice[2]))} tokens each, ${labels}`;
      text.textContent = data.text[steps[1].running ? "runs" : "full"].replace(/\{(\w+)\}/g, (_, name) => words[name]);
      stage.setAttribute("aria-label", text.textContent);
    }
    figure.addEventListener("input", update);
    figure.addEventListener("click", (event) => {
      const on = event.target.dataset.all;
      if (!on) return;
      inputs.slice(4).forEach((input) => { input.checked = on === "1"; });
      update();
    });
    figure.addEventListener("keydown", (event) => event.stopPropagation()); // the page and JupyterLab have keys of their own
    figure.querySelector(".lab-controls").hidden = false;
    update();
  }

  document.querySelectorAll(".lab-simulator:not([data-running])").forEach((figure) => {
    if (!figure.querySelector('script[type="application/json"]')) return;
    figure.dataset.running = "";
    start(figure);
  });
})();
