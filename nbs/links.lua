-- README links to notebooks as files of the repository; on the site they are pages.
function Link(link)
  link.target = link.target:gsub("^nbs/%d+%l?_([%w_]+)%.ipynb", "%1.html")
  return link
end
