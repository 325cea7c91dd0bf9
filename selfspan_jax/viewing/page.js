// Lights up what a step read. Everything that it shows is put together from text nodes: model output is never parsed as markup.
(() => {
  const WORDS = {
    sink: "the sink, label 0",
    own: "its own label",
    toc: "every <seg>, the table of contents",
    wide: "a span token looks wider",
    policy: "policy, named by nothing",
    lost: "names nothing",
  };
  const LONGEST_QUOTE = 120;

  function element(name, className, ...children) {
    const made = document.createElement(name);
    made.className = className;
    made.append(...children);
    return made;
  }

  // "sink:0,13 1:3-8" -> [{ key, kind, ranges: [[first, last], ...] }]; a number is a label that the step named
  function groups(step) {
    let named = 0;
    const words = step.dataset.reads.split(" ").filter(Boolean);
    return words.map((word) => {
      const [key, list] = word.split(":");
      const ranges = list ? list.split(",").map((range) => range.split("-").map(Number)).map(([first, last = first]) => [first, last]) : [];
      return { key, kind: key in WORDS ? key : ranges.length ? `named-${named++ % 4}` : "lost", ranges };
    });
  }

  function setUp(root) {
    const all = (selector) => [...root.querySelectorAll(selector)]; // asked anew: a page that shows a response as it is written grows
    const list = root.querySelector("[role=listbox]");
    const panes = root.querySelector(".panes");
    const reads = root.querySelector(".reads");
    const prompt = root.querySelector(".prompt");
    const hint = [...reads.childNodes];
    const titles = new Map(); // of the tokens that are lit, as they were
    let shown = null;
    let pinned = null;
    let newest = null; // shown as long as none is pinned

    const written = (token) => (token.matches(".seg, .ref, .mark") ? "" : token.textContent);

    function quote(tokens, [first, last], kind) {
      const [shown, between] = kind === "toc" ? [(token) => token.textContent, " "] : [written, ""];
      const text = tokens.slice(first, last + 1).map(shown).join(between);
      const short = text.length > LONGEST_QUOTE ? `${text.slice(0, LONGEST_QUOTE / 2)} … ${text.slice(-LONGEST_QUOTE / 2)}` : text;
      const place = first === last ? `token ${first}` : `tokens ${first} to ${last}`;
      const made = element("span", `quote text k-${kind}${short.trim() ? "" : " place"}`, short.trim() || place);
      made.title = place;
      return made;
    }

    function show(step, again = false) {
      if (step === shown && !again) return;
      shown?.classList.remove("shown");
      for (const token of all(".lit")) token.className = token.className.replace(/ (lit|k-[\w-]+)/g, "");
      for (const [token, title] of titles) token.title = title;
      titles.clear();
      shown = step;
      panes.classList.toggle("reading", Boolean(step));
      if (!step) return reads.replaceChildren(...hint);

      const tokens = all(".t");
      step.classList.add("shown");
      const title = element("p", "title", step.dataset.said);
      const map = element("div", "map"); // where in the sequence
      const rows = groups(step).map(({ key, kind, ranges }) => {
        const reason = WORDS[key] ?? `<ref:${key}> ${kind === "lost" ? WORDS.lost : "names it"}`;
        let count = 0;
        for (const [first, last] of ranges) {
          count += last - first + 1;
          const place = element("span", `k-${kind}`);
          place.style.left = `${(100 * first) / tokens.length}%`;
          place.style.width = `${(100 * (last - first + 1)) / tokens.length}%`;
          map.append(place);
          for (const token of tokens.slice(first, last + 1)) {
            token.className += ` lit k-${kind}`;
            if (!titles.has(token)) titles.set(token, token.title);
            token.title = [token.title, `read: ${reason}`].filter(Boolean).join("; ");
          }
        }
        for (const ref of step.querySelectorAll(`.ref[data-names="${key}"]`)) ref.className += ` lit k-${kind}`;
        const quotes = ranges.map((range) => quote(tokens, range, kind));
        return element("p", "read", element("span", "key", reason), element("span", "", `${count} `, ...quotes));
      });
      reads.replaceChildren(title, map, ...rows);
      reads.scrollTop = 0;
      const inPrompt = [...prompt.querySelectorAll(".lit:not(.k-sink)")];
      if (inPrompt.length) {
        // Scrolls the pane alone: the page, or the notebook around it, stays where it is.
        const top = inPrompt[0].getBoundingClientRect().top - prompt.getBoundingClientRect().top;
        if (top < 0 || top > prompt.clientHeight - 24) prompt.scrollTop += top - prompt.clientHeight / 3;
      }
    }

    function pin(step) {
      pinned = step;
      for (const other of all(".step")) other.setAttribute("aria-selected", String(other === step));
      show(step ?? newest);
    }

    function focus(step) {
      for (const other of all(".step")) other.tabIndex = other === step ? 0 : -1;
      step.focus({ preventScroll: true });
      step.scrollIntoView({ block: "nearest", inline: "nearest" });
    }

    list.addEventListener("pointerover", (event) => show(event.target.closest(".step") ?? pinned ?? newest));
    list.addEventListener("pointerleave", () => show(pinned ?? newest));
    list.addEventListener("focusin", (event) => pin(event.target.closest(".step")));
    list.addEventListener("click", (event) => {
      const step = event.target.closest(".step");
      if (step) focus(step);
      if (step) pin(step);
    });
    list.addEventListener("keydown", (event) => {
      const steps = all(".step");
      const at = steps.indexOf(document.activeElement);
      const to = { ArrowDown: at + 1, ArrowUp: at - 1, PageDown: at + 10, PageUp: at - 10, Home: 0, End: steps.length - 1 }[event.key];
      if (event.altKey || event.ctrlKey || event.metaKey || (to === undefined && !["Escape", "Enter", " "].includes(event.key))) return;
      event.preventDefault();
      event.stopPropagation(); // or a notebook moves to its next cell
      if (event.key === "Escape") pin(null);
      else if (to === undefined) pin(steps[at]);
      else focus(steps[Math.min(Math.max(to, 0), steps.length - 1)]);
    });
    const first = root.querySelector(".step");
    if (first) pin(first);
    // For a response that is being written: its newest step has grown.
    return (step) => {
      newest = step;
      if ((pinned ?? newest) === step && !list.matches(":hover")) show(step, true);
    };
  }

  function setUpNew() {
    for (const root of document.querySelectorAll(".selfspan")) {
      root.selfspan ??= setUp(root); // unless another output of the same notebook has
    }
  }

  setUpNew();
  document.addEventListener("selfspan", setUpNew);
})();
