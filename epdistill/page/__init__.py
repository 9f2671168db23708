"""The report's page: one HTML file that asks nothing of any network.

    document   the whole file: style, script, content security policy
    elements   tables, figures, commands, escaped
    charts     line charts as inline SVG
    overview, robustness, examples, masking, training, making   the page's sections

Sections are functions from recorded facts to HTML text; where nothing was recorded they say so
in one line. The page works without its script, which only sorts tables.
"""
