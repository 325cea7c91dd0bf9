// Runs prompts, several at once, and shows each response as it is written. What a model writes is put in as text nodes only.
(() => {
  const root = document.querySelector(".selfspan-live");
  const form = root.querySelector("form");
  const text = form.querySelector("textarea");
  const runs = root.querySelector(".runs");
  const totals = form.querySelector(".totals");
  const examples = JSON.parse(root.dataset.examples);
  const running = new Set();
  const LONGEST_TITLE = 300;

  function element(name, className, ...children) {
    const made = document.createElement(name);
    made.className = className;
    made.append(...children);
    return made;
  }

  const percent = (share) => `${(100 * share).toFixed(1)}%`;

  // Yields the events of a stream: what follows "data: ", parsed; comments are left out.
  async function* events(body) {
    const reader = body.pipeThrough(new TextDecoderStream()).getReader();
    let waiting = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (waiting + value).split("\n\n");
      waiting = parts.pop();
      for (const part of parts) {
        if (part.startsWith("data: ") && part !== "data: [DONE]") yield JSON.parse(part.slice(6));
      }
    }
  }

  // Writes positions as page.js reads them: "0,3-8".
  function ranges(positions) {
    const found = [];
    for (const position of positions) {
      if (found.length && found.at(-1)[1] === position - 1) found.at(-1)[1] = position;
      else found.push([position, position]);
    }
    return found.map(([first, last]) => (first === last ? `${first}` : `${first}-${last}`)).join(",");
  }

  class Run {
    constructor(prompt) {
      const made = root.querySelector("template").content.cloneNode(true);
      this.section = made.querySelector("section");
      for (const name of ["asked", "answer", "state", "counts", "notes", "stop", "reads"]) this[name] = this.section.querySelector(`.${name}`);
      this.bar = this.section.querySelector(".facts .bar span");
      this.prompt = this.section.querySelector(".prompt .text");
      this.list = this.section.querySelector("ol");
      this.reads.setAttribute("aria-live", "off"); // not while it changes with every token
      this.asked.textContent = prompt.length > LONGEST_TITLE ? `${prompt.slice(0, LONGEST_TITLE - 1)}…` : prompt;
      this.section.querySelector(".panes").hidden = true; // until there is something in them
      this.labels = []; // of each token so far
      this.written = this.attended = this.share = this.steps = 0;
      this.step = null;
      this.control = new AbortController();
      this.stop.addEventListener("click", () => (running.has(this) ? this.control.abort() : this.remove()));
      runs.prepend(made);
      document.dispatchEvent(new Event("selfspan"));
      this.state.textContent = "waiting";
    }

    remove() {
      this.section.remove();
      text.focus();
    }

    async start(prompt, options, key) {
      running.add(this);
      const headers = { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
      const body = JSON.stringify({ prompt, ...options, stream: true, selfspan: { tokens: true } });
      this.asked_at = performance.now();
      let said = "stopped";
      try {
        const response = await fetch("v1/completions", { method: "POST", headers, body, signal: this.control.signal });
        if (!response.ok) {
          if (response.status === 401) form.querySelector(".key").hidden = false;
          throw new Error((await response.json()).error.message);
        }
        for await (const event of events(response.body)) {
          if (event.error) throw new Error(event.error.message);
          for (const choice of event.choices) this.take(choice);
        }
        said = this.reason ? (this.reason === "stop" ? "finished" : "stopped at the limit") : "cut off";
      } catch (error) {
        if (error.name !== "AbortError") {
          said = "failed";
          this.note("warning", "Error:", error.message);
        }
      }
      running.delete(this);
      this.state.textContent = said;
      this.stop.textContent = "Remove";
      this.reads.setAttribute("aria-live", "polite");
      total();
    }

    take({ selfspan: seen, finish_reason: reason }) {
      if (!seen) return;
      this.section.querySelector(".panes").hidden = false;
      for (const token of seen.prompt ?? []) this.prompt.append(this.token(token));
      if (seen.prompt) this.section.querySelector(".prompt .title").textContent = `prompt, ${seen.prompt.length} tokens`;
      for (const token of seen.tokens ?? []) this.write(token);
      if (seen.tokens?.length) {
        this.last_at = performance.now();
        this.first_at ??= this.last_at;
        this.first_tokens ??= this.written;
      }
      if (seen.tokens?.length) this.frame ??= requestAnimationFrame(() => this.show()); // however many events a frame has
      if (reason) {
        cancelAnimationFrame(this.frame);
        this.show();
        this.reason = reason;
        this.end(seen);
      }
    }

    show() {
      this.frame = undefined;
      if (!this.step) return;
      const pane = this.list.parentElement;
      const follows = pane.scrollHeight - pane.scrollTop - pane.clientHeight < 100 && !this.list.contains(document.activeElement);
      this.finishStep();
      this.section.selfspan(this.step);
      if (follows) pane.scrollTop = pane.scrollHeight;
      this.count();
    }

    token({ kind, text, label, names }) {
      this.labels.push(label);
      const shown = kind === "seg" ? `${label}` : names === undefined ? text : `↖${names}`;
      const lost = kind === "ref" && !this.labels.includes(names);
      const made = element("span", `t${kind === "text" ? "" : ` ${kind}`}${lost ? " lost" : ""}`, lost ? `${shown} ?` : shown);
      if (kind !== "text") made.title = lost ? `${text}: names nothing, no token carries that label` : text;
      if (kind === "ref") made.dataset.names = names;
      return made;
    }

    write(token) {
      if (token.kind === "seg" || !this.step) {
        if (this.step) this.finishStep();
        const cells = [element("span", ""), element("span", "bar", element("span", "")), element("span", "")];
        this.body = element("span", "text");
        this.step = element("li", token.kind === "seg" ? "step" : "step odd", element("span", "share", ...cells), this.body);
        this.step.setAttribute("role", "option");
        this.step.setAttribute("aria-selected", "false");
        this.step.tabIndex = this.list.children.length ? -1 : 0;
        this.list.append(this.step);
        this.opened = { label: token.label, isOpened: token.kind === "seg", names: [], tokens: 0, attended: 0, share: 0 };
        this.steps += token.kind === "seg";
      }
      this.body.append(this.token(token));
      if (token.kind === "ref" && !this.opened.names.includes(token.names)) this.opened.names.push(token.names);
      const share = token.attended / this.labels.length;
      this.opened.tokens++;
      this.opened.attended += token.attended;
      this.opened.share += share;
      this.written++;
      this.attended += token.attended;
      this.share += share;
    }

    // Says what the step that was written to last reads: under span attention what carries a label that it may see.
    finishStep() {
      const { label, isOpened, names, tokens, attended, share } = this.opened;
      const [count, bar, portion] = this.step.firstChild.children;
      count.textContent = (attended / tokens).toFixed(1);
      portion.textContent = `${Math.round((100 * share) / tokens)}%`;
      bar.firstChild.style.width = percent(share / tokens);
      const what = isOpened ? `label ${label}` : "before the first step";
      this.step.dataset.said = `${what}: ${count.textContent} tokens on average (${percent(share / tokens)})`;
      const carrying = (wanted) => ranges(this.labels.flatMap((own, position) => (own === wanted ? [position] : [])));
      const groups = [["sink", 0], ...(label ? [["own", label]] : []), ...names.filter((name) => name && name !== label).map((name) => [name, name])];
      const reads = groups.map(([key, wanted]) => `${key}:${carrying(wanted)}`).join(" ");
      this.step.dataset.reads = root.dataset.attention === "span" ? reads : "";
    }

    count() {
      const seconds = (this.last_at - this.first_at) / 1000;
      this.rate = seconds ? (this.written - this.first_tokens) / seconds : 0;
      this.state.textContent = "decoding";
      const share = percent(this.share / this.written);
      this.bar.style.width = share;
      const speed = this.rate ? ` · ${this.rate.toFixed(0)} tokens/s` : "";
      const attended = `attended: ${(this.attended / this.written).toFixed(1)} tokens, ${share} of the context`;
      this.counts.textContent = `${attended} · steps: ${this.steps} · tokens: ${this.written}${speed} · first after ${(this.first_at - this.asked_at).toFixed(0)} ms`;
      total();
    }

    end({ answer, verdict, warnings }) {
      if (answer !== null) this.answer.textContent = `→ ${answer.length > LONGEST_TITLE ? `${answer.slice(0, LONGEST_TITLE - 1)}…` : answer}`;
      for (const warning of warnings) this.note("warning", "Warning:", warning);
      if (!verdict) return;
      const right = verdict.answer_right && verdict.steps_right && verdict.spans_right;
      this.note(`verdict ${right ? "right" : "wrong"}`, right ? "✓ Right:" : "✗", verdict.message);
      this.answer.className += right ? " right" : " wrong";
    }

    note(className, head, message) {
      this.notes.append(element("p", className, element("strong", "", head), ` ${message}`));
    }
  }

  function total() {
    const rate = [...running].reduce((sum, run) => sum + (run.rate || 0), 0);
    totals.textContent = running.size ? `running: ${running.size} · ${rate.toFixed(0)} tokens/s` : "";
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const prompt = text.value;
    if (!prompt.trim()) return text.focus();
    const options = {};
    for (const input of form.querySelectorAll(".options input")) if (input.value !== "") options[input.name] = Number(input.value);
    new Run(prompt).start(prompt, options, form.elements.key.value);
    total();
  });
  text.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
  if (examples.length) {
    let next = 0;
    form.elements.example.hidden = false;
    form.elements.example.addEventListener("click", () => {
      text.value = examples[next++ % examples.length];
      text.focus();
    });
  }
})();
