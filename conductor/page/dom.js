// Elements. Everything that comes from the cluster or a model becomes a text node or an attribute,
// never markup.

const SVG = "http://www.w3.org/2000/svg";

/** An element with attributes and children; strings become text. A function is a listener. */
export function h(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

/** The same in SVG. */
export function s(name, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

export function byId(id) {
  return document.getElementById(id);
}

/** Only when it changes: what did not change is not announced or painted again. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export function setAttribute(node, name, value) {
  if (value === null) node.removeAttribute(name);
  else if (node.getAttribute(name) !== String(value)) node.setAttribute(name, value);
}

/**
 * Makes the children of `parent` one node for each item, in order. Nodes of items that stay are
 * kept, with their focus and what is open in them. `update(node, item)` is called for each.
 */
export function keyed(parent, items, keyOf, create, update) {
  const before = nodes.get(parent) ?? new Map();
  const after = new Map();
  for (const item of items) {
    const key = keyOf(item);
    const node = before.get(key) ?? create(item);
    before.delete(key);
    update(node, item);
    after.set(key, node);
  }
  for (const node of before.values()) node.remove();
  const own = new Set(after.values());
  let next = [...parent.children].find((child) => own.has(child)) ?? null;
  for (const node of after.values()) {
    if (node === next) {
      next = node.nextElementSibling;
    } else {
      parent.insertBefore(node, next);
    }
  }
  nodes.set(parent, after);
}

const nodes = new WeakMap(); // parent -> its nodes by key

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value !== null) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}
