// Names for those who hear the page: the theme leaves the search and the buttons of code blocks without one.
function name(parts, text) {
  parts.forEach((part, i) => {
    if (!part.hasAttribute("aria-label")) part.setAttribute("aria-label", text(i + 1))
  })
}

function nameAll() {
  name(document.querySelectorAll(".md-search[role=dialog]"), () => "Search")
  name(document.querySelectorAll("nav.md-code__nav"), (number) => `Code block ${number}`)
  // A wide table scrolls by the keyboard too.
  document.querySelectorAll(".md-typeset__scrollwrap").forEach((part) => part.setAttribute("tabindex", "0"))
}

nameAll()
new MutationObserver(nameAll).observe(document.body, { childList: true, subtree: true })
