@echo off
rem A walk through queuectl on Windows: run demo.bat from cmd.exe, in any directory.
rem It keeps to a home of its own below %TEMP%, which it removes at the end, checks the exit
rem code of every step, and exits with 0 only if each of them went as it should.
setlocal EnableExtensions DisableDelayedExpansion
set "SCRIPT=%~dp0queuectl.py"
set "DEMO="
set "FAILED="

python -c "import click" >nul 2>nul
if not "%errorlevel%"=="0" (
    echo Demo FAILED: it needs python with click; run: python -m pip install -r requirements.txt
    exit /b 1
)
rem %RANDOM% is the same in two demos that start in the same second.
for /f "usebackq delims=" %%D in (`python -c "import tempfile; print(tempfile.mkdtemp(prefix='queuectl demo '))"`) do set "DEMO=%%D"
if not defined DEMO (
    echo Demo FAILED: there is no room for it in the directory of temporary files
    exit /b 1
)
set "QUEUECTL_HOME=%DEMO%\home"
pushd "%DEMO%"

call :step 1. Configuration: set and get
call :run config set max-retries 1
call :run config set backoff-base 1
call :run config get max_retries
call :run config get backoff_base

call :step 2. Enqueue: as JSON, as typed, and what is refused
call :run enqueue "{\"id\": \"hello\", \"command\": \"echo Hello from queuectl\"}"
call :run enqueue --id broken -- "if exist mended.txt (echo Mended) else (echo Not yet & exit 3)"
call :refused enqueue --id hello -- "echo the id exists"
call :refused enqueue "{\"id\": \"typo\", \"comand\": \"echo\"}"

call :step 3. Enqueue: a low and a high priority, a delay, a time-out
call :run enqueue --id low --priority 1 -- "echo low>>order.txt"
call :run enqueue --id high --priority 10 -- "echo high>>order.txt"
call :run enqueue --id slow --timeout 2s --max-retries 0 -- ping -n 60 127.0.0.1
call :run enqueue --id later --delay 10s -- "echo Later"
call :run list
call :run list --next 3

call :step 4. Start a worker: it is up when the command returns
call :run worker start
call :run show later
call :run worker list
call :run status

call :step 5. Wait for execution
ping -n 4 127.0.0.1 >nul
call :await hello completed
call :await low completed
call :await slow dead
call :await broken dead
call :await later completed
set "FIRST="
if not defined FAILED for /f %%L in (order.txt) do if not defined FIRST set "FIRST=%%L"
if not defined FAILED if not "%FIRST%"=="high" set "FAILED=the high priority did not run first"

call :step 6. Look: list, logs, show, metrics
call :run list
call :run logs hello
call :run logs --failed
call :run show slow
call :run metrics

call :step 7. Dead letter queue: list, and retry once the cause is mended, and run a job again
call :run dlq list
echo mended>mended.txt
call :run dlq retry broken
call :await broken completed
call :run show broken
call :run rerun hello -- "echo Hello once more"
call :await hello completed
call :run logs hello

call :step 8. Stop the worker; jobs stay, and the next workers take them up
call :run worker stop
call :run enqueue --id kept -- "echo Kept"
call :run status
call :run worker scale 2
call :await kept completed
call :run worker stop
call :run worker list
call :run status

if defined FAILED goto failed
call :clean
echo.
echo Demo passed: every step did what it should.
exit /b 0

:step
if defined FAILED exit /b 1
echo.
echo === %*
exit /b 0

:run
rem One queuectl command, which must succeed; after a failure nothing more is run.
if defined FAILED exit /b 1
echo.
echo ^> queuectl %*
python "%SCRIPT%" %*
if not "%errorlevel%"=="0" set "FAILED=queuectl %1 %2 exited with %errorlevel%"
exit /b 0

:refused
rem One queuectl command, which must not succeed.
if defined FAILED exit /b 1
echo.
echo ^> queuectl %*
python "%SCRIPT%" %*
if "%errorlevel%"=="0" set "FAILED=queuectl %1 %2 should have been refused"
exit /b 0

:await
rem Look once a second, for a minute, whether job %1 has come to state %2.
if defined FAILED exit /b 1
set "TRIES=0"
:look
python "%SCRIPT%" list --state %2 | find "%1 " >nul
if "%errorlevel%"=="0" (
    echo job %1 is %2
    exit /b 0
)
set /a TRIES+=1 >nul
if "%TRIES%"=="60" (
    set "FAILED=job %1 is not %2 after a minute"
    exit /b 1
)
ping -n 2 127.0.0.1 >nul
goto look

:failed
echo.
python "%SCRIPT%" list
for %%J in (hello broken low high slow later kept) do python "%SCRIPT%" show %%J
python "%SCRIPT%" worker stop --now
if exist "%QUEUECTL_HOME%\worker.log" type "%QUEUECTL_HOME%\worker.log"
call :clean
echo.
echo Demo FAILED: %FAILED%
exit /b 1

:clean
popd
ping -n 2 127.0.0.1 >nul
rmdir /s /q "%DEMO%"
exit /b 0
