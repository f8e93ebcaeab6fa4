// Tabs as the ARIA Authoring Practices describe them: arrow keys, Home and End choose.

/** Each panel is told with an event `show` when it comes to be seen. */
export function startTabs(tablist) {
  const tabs = [...tablist.querySelectorAll("[role=tab]")];

  function choose(chosen) {
    for (const tab of tabs) {
      const shown = tab === chosen;
      tab.setAttribute("aria-selected", String(shown));
      tab.tabIndex = shown ? 0 : -1;
      panelOf(tab).hidden = !shown;
    }
    panelOf(chosen).dispatchEvent(new Event("show"));
  }

  for (const tab of tabs) tab.onclick = () => choose(tab);
  tablist.onkeydown = (event) => {
    const current = tabs.indexOf(event.target);
    const next = {
      ArrowRight: (current + 1) % tabs.length,
      ArrowLeft: (current + tabs.length - 1) % tabs.length,
      Home: 0,
      End: tabs.length - 1,
    }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    choose(tabs[next]);
    tabs[next].focus();
  };
}

function panelOf(tab) {
  return document.getElementById(tab.getAttribute("aria-controls"));
}
