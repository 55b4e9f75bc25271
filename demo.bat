@echo off
rem A walk through queuectl on Windows: run demo.bat from cmd.exe, in any directory.
rem It keeps to a home of its own below %TEMP%, which it removes at the end, checks the exit
rem code of every step, and exits with 0 only if each went as it should.
setlocal EnableExtensions DisableDelayedExpansion
set "QUEUECTL=python "%~dp0queuectl.py""
set "DEMO=%TEMP%\queuectl-demo-%RANDOM%-%RANDOM%"
set "QUEUECTL_HOME=%DEMO%\home"
set "STEP=set-up"

python -c "import click" >nul 2>nul
if errorlevel 1 (
    echo Demo FAILED: python with click is needed; run: python -m pip install -r requirements.txt
    exit /b 1
)
mkdir "%DEMO%" || exit /b 1
pushd "%DEMO%" || exit /b 1

call :step "1. Configuration: set, get"
%QUEUECTL% config set max-retries 1 || goto failed
%QUEUECTL% config set backoff-base 1 || goto failed
%QUEUECTL% config get max_retries || goto failed
%QUEUECTL% config get backoff_base || goto failed

call :step "2. Enqueue: as JSON, as typed, and what is refused"
%QUEUECTL% enqueue "{\"id\": \"hello\", \"command\": \"echo Hello from queuectl\"}" || goto failed
%QUEUECTL% enqueue --id broken -- "if exist fixed.txt (echo Fixed) else (echo Not yet & exit 3)" || goto failed
%QUEUECTL% enqueue --id hello -- echo again && goto failed
%QUEUECTL% enqueue "{\"id\": \"typo\", \"comand\": \"echo\"}" && goto failed

call :step "3. Enqueue: a low and a high priority, a delay, a time-out"
%QUEUECTL% enqueue --id low --priority 1 -- "echo low>>order.txt" || goto failed
%QUEUECTL% enqueue --id high --priority 10 -- "echo high>>order.txt" || goto failed
%QUEUECTL% enqueue --id later --delay 8s -- "echo Later" || goto failed
%QUEUECTL% enqueue --id slow --timeout 2s --max-retries 0 -- ping -n 60 127.0.0.1 || goto failed
%QUEUECTL% list || goto failed

call :step "4. Start a worker: it is there when the command returns"
%QUEUECTL% worker start || goto failed
%QUEUECTL% worker list || goto failed
%QUEUECTL% status || goto failed
%QUEUECTL% show later || goto failed

call :step "5. Wait for execution"
ping -n 3 127.0.0.1 >nul
call :await hello completed || goto failed
call :await low completed || goto failed
call :await slow dead || goto failed
call :await broken dead || goto failed
call :await later completed || goto failed
set "FIRST="
set /p FIRST=<order.txt
if not "%FIRST%"=="high" goto failed
echo The high priority ran first, the late one late, and ping was ended after two seconds.

call :step "6. Look: list, logs, show, metrics"
%QUEUECTL% list || goto failed
%QUEUECTL% logs hello || goto failed
%QUEUECTL% logs broken || goto failed
%QUEUECTL% show slow || goto failed
%QUEUECTL% metrics || goto failed

call :step "7. Dead letter queue: list, and retry once the cause is mended"
%QUEUECTL% dlq list || goto failed
echo mended>fixed.txt
%QUEUECTL% dlq retry broken || goto failed
call :await broken completed || goto failed
%QUEUECTL% show broken || goto failed

call :step "8. Stop the worker; jobs stay, and another takes them up"
%QUEUECTL% worker stop || goto failed
%QUEUECTL% enqueue --id kept -- echo Kept || goto failed
%QUEUECTL% status || goto failed
%QUEUECTL% worker start --count 2 || goto failed
call :await kept completed || goto failed
%QUEUECTL% worker stop || goto failed
%QUEUECTL% worker list || goto failed

call :clean
echo.
echo Demo passed: every step did what it should.
exit /b 0

:step
set "STEP=%~1"
echo.
echo === %~1
exit /b 0

:await
rem Look once a second whether job %1 has come to state %2, for a minute.
set "TRIES=0"
:look
%QUEUECTL% list --state %2 | find "%1 " >nul && exit /b 0
set /a TRIES+=1
if %TRIES% geq 60 exit /b 1
ping -n 2 127.0.0.1 >nul
goto look

:failed
echo.
echo Demo FAILED in step %STEP%
%QUEUECTL% list
if exist "%QUEUECTL_HOME%\worker.log" type "%QUEUECTL_HOME%\worker.log"
%QUEUECTL% worker stop --now
call :clean
exit /b 1

:clean
popd
rmdir /s /q "%DEMO%"
exit /b 0
