"""The comparison demo: one question, answered with and without blended KV, side by side. `lmcache-rag demo` runs it.

The logic needs no NiceGUI; the page only shows it::

    samples       the documents and questions that come with the package
    arms          one way to answer: an engine, whether it blends, and the other requests on it
    hub           shared by all sessions: store, engines, ingestion
    session       the state of one browser: passages, panes, controls, repetitions
    record        questions and answers, as JSON, as a bar over the prompt, and as differing words

    server        the page's web server, and its password
    page          the page: question, passages, settings, uploads, export
    page_answers  the page's answers: both panes, the check, repetitions
    page_parts    the page's small parts and its style
"""
