"""The page in the browser: ``serving`` is the command, ``layout`` the page, ``desk`` what it does with photographs,
``views`` the pictures it shows, ``paths`` what keeps the server's folders out of sight.
"""
