"""RUN/report.html: one page that shows a run, without network and without script."""
