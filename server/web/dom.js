// Building and changing nodes. Data becomes text, never markup.

/** The element of index.html with this id. Throws if there is none. */
export function byId(id) {
  const found = document.getElementById(id);
  if (found === null) throw new Error(`index.html has no #${id}`);
  return found;
}

/** A new element with DOM properties (`className`, `textContent`, `onclick`…) and children. */
export function element(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

/** Set the text only if it is another one: live regions announce each change, equal or not. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/**
 * Make `parent` hold one child for each item, in order. A child lives as long as its key is there,
 * so that focus and what the user opened survive an update.
 * `create(item)` gives a child, `update(child, item)` fills it.
 */
export function keyed(parent, items, keyOf, create, update) {
  const keys = new Set(items.map((item) => String(keyOf(item))));
  const known = new Map();
  for (const child of [...parent.children]) {
    if (keys.has(child.dataset.key)) known.set(child.dataset.key, child);
    else child.remove();
  }
  let place = parent.firstElementChild;
  for (const item of items) {
    const key = String(keyOf(item));
    let child = known.get(key);
    if (child === undefined) {
      child = create(item);
      child.dataset.key = key;
    }
    update(child, item);
    // What stands where it should is not touched: a node that is moved loses the focus.
    if (child === place) place = place.nextElementSibling;
    else parent.insertBefore(child, place);
  }
}
