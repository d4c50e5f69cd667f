"""Sphinx's settings for the site; scripts/site.py copies this folder beside the pages that it prepares.

Nothing is fetched when a page is read: no MathJax, no require.js, no web fonts, and the search is a file of the site.
"""

project = author = "stepengine"
html_title = "stepengine"
language = "en"
extensions = ["myst_nb"]
exclude_patterns = ["static", "extra", "conf.py"]

nb_execution_mode = "off"  # scripts/site.py has run them, with the players saved on the way
nb_merge_streams = True
nb_ipywidgets_js: dict[str, dict[str, str]] = {}  # the default is two scripts of another host
nb_render_markdown_format = "myst"
myst_enable_extensions: list[str] = []  # a dollar is a dollar
myst_heading_anchors = 3
# stored notebooks begin sections where the story needs them, and show source code that no lexer has to like
suppress_warnings = ["myst.header", "misc.highlighting_failure", "mystnb.lexer"]

html_theme = "sphinx_book_theme"
html_theme_options = {
    "use_download_button": False,
    "use_fullscreen_button": False,
    "use_source_button": False,
    "footer_content_items": [],
    "home_page_in_toc": True,
    "navbar_persistent": [],  # the search field is in the sidebar
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
html_context = {"default_mode": "auto"}  # light or dark as the reader's system has it
html_static_path = ["static"]
html_extra_path = ["extra"]
html_css_files = ["site.css"]
html_js_files = ["site.js"]
html_copy_source = False
html_use_index = False
html_show_search_summary = False  # it would fetch each page found, which a page opened from a disk may not
html_show_copyright = False
html_last_updated_fmt = None
