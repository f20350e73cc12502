# Server and guest need a role each; put into the settings of firebuild:
echo 'server_role: $server'
echo 'guest_role: $guest'
