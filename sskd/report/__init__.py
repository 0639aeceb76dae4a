"""The results of many runs, laid out beside the published figures.

Nothing here needs PyTorch, so the report starts at once on any machine that has the run folders.

``report.read_report`` reads a folder of runs; its ``Report`` gives the tables, their CSV, and what
is unfinished or missing. ``figures.draw_figures`` draws the plots by name, ``figures.as_png`` and
``as_svg`` make files of them, ``page.render_page`` the page, ``files.write_files`` all of it.
"""
