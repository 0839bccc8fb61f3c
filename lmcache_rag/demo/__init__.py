"""The comparison demo: one question, answered with and without blended KV, side by side. `lmcache-rag demo` runs it.

The logic needs no NiceGUI; the page only shows it::

    samples      the documents and questions that come with the package
    traffic      who computes on an engine at the same time
    arms         one way to answer: an engine, and whether it blends
    hub          what all sessions share: store, engines, ingestion
    session      what one browser sees and does: passages, panes, controls
    record       what was asked and answered, as JSON
    repeating    both arms many times, in random order
    differences  which words of two answers differ
    password     who may open the page from elsewhere

    server       the page's web server
    page         the page, put together from
    page_panes, page_passages, page_controls, page_extras, page_parts
"""
