// What a page must have for people who cannot see it, or not well; returns what is wrong.
() => {
  const wrong = [];
  const check = (right, what) => right || wrong.push(what);
  const all = (selector) => [...document.querySelectorAll(selector)];
  const name = (e) => `${e.tagName.toLowerCase()}${e.id ? "#" + e.id : ""}.${e.getAttribute("class") ?? ""}`;

  check(document.documentElement.lang, "the document has no language");
  check(all("h1").length === 1, "not one h1");
  check(all("main").length === 1 && all("header").length === 1, "landmarks");
  const ids = all("[id]").map((e) => e.id);
  ids.filter((id, at) => ids.indexOf(id) !== at).forEach((id) => check(false, `id ${id} twice`));
  let level = 0;
  for (const heading of all("h1, h2, h3, h4, h5, h6").filter((e) => e.checkVisibility())) {
    const own = Number(heading.tagName[1]);
    check(own <= level + 1, `${name(heading)} leaves a level out`);
    level = own;
  }
  for (const field of all("input, select, textarea")) {
    check(field.labels.length || field.ariaLabel, `${name(field)} has no label`);
  }
  for (const thing of all("button, a, summary")) {
    if (!thing.checkVisibility()) continue;
    check((thing.ariaLabel || thing.textContent).trim(), `${name(thing)} has no name`);
  }
  all("img").forEach((image) => check(image.hasAttribute("alt"), `${name(image)} has no alt`));
  all('[role="img"]').forEach((e) => check(e.ariaLabel, `${name(e)} has no name`));
  all("table").forEach((table) => check(table.caption || table.hasAttribute("aria-labelledby"), `${name(table)} has no caption`));
  for (const attribute of ["aria-labelledby", "aria-describedby", "aria-controls", "for"]) {
    for (const e of all(`[${attribute}]`)) {
      check(document.getElementById(e.getAttribute(attribute)), `${name(e)}: ${attribute} leads nowhere`);
    }
  }
  check(document.querySelector('[aria-live="polite"]'), "no polite live region");

  const numbers = (colour) => (colour.match(/[\d.]+/g) ?? []).map(Number);
  const ground = (e) => {
    for (let at = e; at; at = at.parentElement) {
      const colour = numbers(getComputedStyle(at).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const luminance = (colour) => {
    const [r, g, b] = colour.map((part) => {
      const share = part / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let text = texts.nextNode(); text; text = texts.nextNode()) {
    const parent = text.parentElement;
    if (!text.data.trim() || !parent.checkVisibility() || parent.closest("svg, .unseen, :disabled")) continue;
    const own = luminance(numbers(getComputedStyle(parent).color).slice(0, 3));
    const behind = luminance(ground(parent).slice(0, 3));
    const contrast = (Math.max(own, behind) + 0.05) / (Math.min(own, behind) + 0.05);
    check(contrast >= 4.5, `${name(parent)} "${text.data.trim().slice(0, 20)}": contrast ${contrast.toFixed(2)}`);
  }
  for (const e of all("button, summary, input, select, textarea, a")) {
    if (!e.checkVisibility() || e.closest(".unseen, .skip, footer, p") || e.type === "radio") continue;
    check(e.getBoundingClientRect().height >= 20, `${name(e)} is too small to touch`);
  }
  return wrong;
}
