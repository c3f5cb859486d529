// a page that is opened from a disk may not read others: results of a search come without excerpts there
if (location.protocol === "file:") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
