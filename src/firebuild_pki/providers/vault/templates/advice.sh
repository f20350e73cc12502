# Put into the settings of firebuild:
echo 'server_role: $server'
echo 'guest_role: $guest'
