"""The report: the results of many runs beside the published values.

Nothing here needs PyTorch, so the report starts at once on any machine that has the run folders.

``report.read_report`` reads a folder of runs. Its ``Report`` has the tables, their CSV, and the
unfinished and missing runs. ``figures.draw_figures`` draws the figures by name, ``figures.as_png``
and ``as_svg`` turn them into files, ``page.render_page`` renders the page, and
``files.write_files`` writes all of it.
"""
